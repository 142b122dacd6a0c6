"""``clusterns report``: a run, or several compared, as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from clusterns_ray.errors import ConfigError
from clusterns_ray.report.page import Page, write_page
from clusterns_ray.report.record import read_run


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> tuple[Path, Page]:
    """Read the directories of one or several runs, or that of a study, and write what they tell as an HTML file.

    Args:
        output: the file; if None, ``report.html`` in the directory of the run, and for several runs in the deepest
            directory that holds them all.

    Returns:
        The file, and what it shows.

    Raises:
        ConfigError: a directory is not a run or is given twice, or the file cannot be written.
        DataError: a file of a run is damaged.
    """
    directories = [Path(run) for run in runs]
    path = Path(output) if output is not None else default_output(directories)
    if path.suffix not in (".html", ".htm"):
        raise ConfigError(f"-o is {str(path)!r}; the report is a page, so give a file that ends in .html.")
    for number, directory in enumerate(directories):
        if directory.resolve() in [other.resolve() for other in directories[:number]]:
            raise ConfigError(f"{str(directory)!r} is named twice; name each run once.")
    if len(directories) == 1 and (directories[0] / "study.yaml").is_file():
        from clusterns_ray.report.study import write_study_report

        return write_study_report(directories[0], path)
    records = [read_run(directory) for directory in directories]
    if len(records) == 1:
        from clusterns_ray.report.run import run_page

        page = run_page(records[0])
    else:
        from clusterns_ray.report.compare import compare_page

        page = compare_page(records, path.parent)
    write_page(path, page)
    return path, page


def default_output(directories: Sequence[Path]) -> Path:
    """``RUN/report.html``, or ``report.html`` in the deepest directory that holds all runs."""
    if not directories:
        raise ConfigError("No run is named; give the directory of one, such as runs/NAME.")
    if len(directories) == 1:
        return directories[0] / "report.html"
    return Path(os.path.commonpath([directory.resolve().parent for directory in directories])) / "report.html"
