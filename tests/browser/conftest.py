"""Pages in a real headless Chromium; skipped where there is none, or no playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium: the file that the environment variable CHROMIUM names, or ``chromium`` on the path."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if not executable:
        pytest.skip("no chromium: install it, or set CHROMIUM to its path")
    with sync_api.sync_playwright() as playwright:
        # root, as in containers, has no sandbox
        found = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield found
        found.close()


@dataclass
class Opened:
    """A page, and what was noticed about it."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file at a size and in a theme, and wait until its plots (or ``drawn``) are drawn or given up."""
    contexts = []

    def open(
        path: Path,
        width: int = 1280,
        height: int = 900,
        theme: str = "light",
        before: str = "",
        drawn: str = "drawn",
        **options: Any,
    ) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme, **options)
        contexts.append(context)
        opened = Opened(context.new_page())
        opened.page.on(
            "console", lambda m: opened.complaints.append(m.text) if m.type in ("error", "warning") else None
        )
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.on("dialog", lambda dialog: opened.complaints.append(dialog.message))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        if before:
            opened.page.add_init_script(before)
        opened.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            opened.page.wait_for_selector(f"html[data-{drawn}]", state="attached", timeout=60_000)
        return opened

    yield open
    for context in contexts:
        context.close()
