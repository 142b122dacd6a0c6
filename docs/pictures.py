"""Make the documentation's pictures of a report and of a map from a real run, a shorter one than the quickstart's.

    python docs/pictures.py

Trains the run under runs/ if it is not there yet, writes its report and its map, and takes screenshots of them with
Chromium, which the environment variable CHROMIUM names or PATH holds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
RUN = "runs/short"
SETTINGS = (
    "runtime.name=short",
    "runtime.log_every_steps=2",
    "encoder.num_layers=1",
    "data.limit=2000",
    "train.global_batch_size=32",
    "train.learning_rate=2e-4",
    "clustering.start_cosine=0.8",
    "evaluation.structure_pairs=400",
)
WIDTH, HEIGHT = 1100, 1000
LARGEST = 200_000


def clusterns(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "clusterns_ray.cli", *arguments], cwd=ROOT, check=True)


def main() -> None:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not chromium:
        sys.exit("There is no chromium in PATH, and CHROMIUM is not set. Install it, or set CHROMIUM to its path.")
    clusterns("train", "experiments/quickstart.yaml", *(word for value in SETTINGS for word in ("--set", value)))
    clusterns("report", RUN)
    clusterns("map", RUN)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto((ROOT / RUN / "report.html").as_uri())
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=60_000)
        save(page, "report")
        page.set_viewport_size({"width": 1120, "height": 640})
        page.goto((ROOT / RUN / "map.html").as_uri())
        page.wait_for_selector("html[data-mapped]", state="attached", timeout=60_000)
        save(page.locator("#map"), "map")
        browser.close()


def save(shown: Page | Locator, name: str) -> None:
    """Take a picture of a page or of a part of it, of a size that the documentation bears."""
    picture = IMAGES / f"{name}.png"
    shown.screenshot(path=picture)
    if picture.stat().st_size > LARGEST:
        sys.exit(f"{picture} has {picture.stat().st_size:,} bytes, more than {LARGEST:,}; lower HEIGHT.")
    print(f"Wrote {picture}")


if __name__ == "__main__":
    main()
