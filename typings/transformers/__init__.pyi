"""For pyright, which would read 2,700 files of models through the package's own imports. Submodules are as they are."""

from typing import Any

def __getattr__(name: str) -> Any: ...
