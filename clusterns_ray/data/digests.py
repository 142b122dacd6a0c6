"""Digests of what a run reads, so that one that goes on does not go on with other data."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from clusterns_ray.errors import DataError
from clusterns_ray.evaluation.sts import Pairs

NAMES = {"corpus": "corpus", "dev": "dev set"}


def data_digests(manifest: dict[str, Any], dev: Pairs | None) -> dict[str, str | None]:
    """Digests of the tokens and of the dev set's pairs; they depend on neither paths nor times nor file layout.

    Args:
        manifest: of the token store.
        dev: None where there is no dev set.

    Returns:
        ``corpus`` and ``dev``, in hexadecimal; ``dev`` is None without a dev set.
    """
    # The texts and the tokenizer decide the tokens, with max_length and prompt, which the configuration names.
    corpus = [manifest.get("digest"), manifest["fingerprint"].get("tokenizer")]
    pairs = dev and [dev.name, dev.sentences1, dev.sentences2, dev.scores.tolist()]
    return {"corpus": _digest(corpus), "dev": _digest(pairs) if pairs else None}


def check_digests(what: str, before: dict[str, str | None] | None, now: dict[str, str | None]) -> None:
    """Refuse to go on with other data than ``what`` was begun with.

    Args:
        what: the run or study, as a message names it.
        before: the digests it was begun with; None where they were not kept.

    Raises:
        DataError: they differ.
    """
    changes = [
        f"the digest of the {NAMES[key]} was {old or 'none'} and is {now.get(key) or 'none'}"
        for key, old in (before or {}).items()
        if old != now.get(key)
    ]
    if changes:
        raise DataError(
            f"{what} was begun with other data: {'; '.join(changes)}. What was learnt from one is not mixed with the "
            "other. Put the data back as it was to go on, or choose another name for the new data."
        )


class DataDigests:
    """The digests of a run's data as a part of its checkpoints: one of other data is refused when it is loaded."""

    def __init__(self, what: str, digests: dict[str, str | None]) -> None:
        self.what, self.digests = what, digests

    def state_dict(self) -> dict[str, str | None]:
        return self.digests

    def load_state_dict(self, state: dict[str, str | None]) -> None:
        """
        Raises:
            DataError: the checkpoint is of other data.
        """
        check_digests(self.what, state, self.digests)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
