"""``clusterns report``: a run, or several compared, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clusterns_ray.errors import ClusterNSError, ConfigError, DataError
from clusterns_ray.io.paths import Named, check_path, names
from clusterns_ray.report.page import Page, write_page
from clusterns_ray.report.places import Target, source, target_of
from clusterns_ray.report.record import read_run


class Written(NamedTuple):
    """A report that was written; shown as its headline and its place."""

    path: Path
    """the file on this machine"""
    page: Page
    """what it shows"""
    url: str | None
    """where else it is"""

    def __repr__(self) -> str:
        return "\n".join([*self.page.headline, f"Report: {self.url or self.path}"])


def write_report(runs: Named | Sequence[Named], output: Named | None = None) -> Written:
    """Read one or several runs, or a study, and write their report as an HTML file.

    Args:
        runs: one or several directories or URLs in an object store, whose small files are copied to this machine.
        output: the file; if None, ``report.html`` beside the run, and for several runs in the deepest directory that
            holds them all. A page for an object store is written on this machine first, and stays there.

    Raises:
        ConfigError: something is not a run or is given twice, or the file cannot be written.
        DataError: a file of a run is damaged.
        StorageError: an object store cannot be read or written.
    """
    runs = [check_path("RUN", run) for run in names(runs)]
    target = target_of(runs, None if output is None else check_path("--output", output))
    if target.path.suffix not in (".html", ".htm"):
        raise ConfigError(f"-o is {str(output)!r}; the report is a page, so give a file that ends in .html.")
    try:
        page = _write(runs, target)
    except ClusterNSError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        named = ", ".join(repr(str(run)) for run in runs[:5])
        raise DataError(
            f"{named}: a file holds values that no run writes ({type(error).__name__}: {error}). Restore its files "
            "from a copy."
        ) from error
    target.publish()
    return Written(target.path, page, target.url)


def _write(runs: Sequence[str], target: Target) -> Page:
    sources = [source(run) for run in runs]
    for number, (directory, _) in enumerate(sources):
        if directory.resolve() in [other.resolve() for other, _ in sources[:number]]:
            raise ConfigError(f"{str(runs[number])!r} is named twice; name each run once.")
    if len(sources) == 1 and (sources[0][0] / "study.yaml").is_file():
        from clusterns_ray.report.study import write_study_report

        return write_study_report(sources[0][0], target.path)[1]
    records = [read_run(directory, address) for directory, address in sources]
    if len(records) == 1:
        from clusterns_ray.report.run import run_page

        page = run_page(records[0])
    else:
        from clusterns_ray.report.compare import compare_page

        page = compare_page(records, target.path.parent)
    write_page(target.path, page)
    return page
