"""Make the pictures of the documentation from real runs: the quickstart, and the smoke study.

    python docs/pictures.py

Trains what is not there yet under runs/ (three minutes and one minute on two cores), writes the reports, and
photographs the first screen of each with Chromium, which the environment variable CHROMIUM names or the path holds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
PICTURES = {
    "report": (["train", "experiments/quickstart.yaml"], "quickstart", 1020),
    "study": (["tune", "experiments/studies/smoke.yaml"], "smoke", 1020),
}
"""Of each the command that makes it, the run or study, and the height in pixels."""
WIDTH = 1100
LARGEST = 200_000


def clusterns(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "clusterns_ray.cli", *arguments], cwd=ROOT, check=True)


def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("There is no chromium: install it, or set CHROMIUM to its path.")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (command, run, height) in PICTURES.items():
            clusterns(*command)
            page_file, picture = Path(folder, f"{name}.html"), IMAGES / f"{name}.png"
            clusterns("report", f"runs/{run}", "-o", str(page_file))
            page = browser.new_page(viewport={"width": WIDTH, "height": height}, color_scheme="light")
            page.goto(page_file.as_uri())
            page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
            page.screenshot(path=picture)
            if picture.stat().st_size > LARGEST:
                sys.exit(f"{picture} has {picture.stat().st_size:,} bytes, more than {LARGEST:,}; lower its height.")
            print(f"Wrote {picture}")
        browser.close()


if __name__ == "__main__":
    main()
