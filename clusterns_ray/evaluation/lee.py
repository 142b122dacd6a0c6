"""The fifty news documents of Lee, Pincombe and Welsh, each pair graded by people, as gensim's wheel carries them.

M. D. Lee, B. Pincombe and M. Welsh, "An empirical evaluation of models of text document similarity", CogSci 2005: each
of the 1,225 pairs has the mean of 8 to 12 judgements. The documents are of 51 to 126 words, so an encoder has to read
far beyond a sentence (256 tokens hold each of them). gensim itself is not imported.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from clusterns_ray.errors import DataError

LEE = "LEE50/test"
"""The name of the set, as TASK/SUBSET."""

REMEDY = 'Install the extra: pip install "clusterns-ray[demo]"'
_DOCUMENTS = 50


def lee_pairs() -> tuple[list[str], list[str], np.ndarray]:
    """First documents, second documents and mean judgements (0 to 1, float64) of all 1,225 pairs.

    Raises:
        DataError: gensim is not installed, or its files are not those expected.
    """
    folder = _test_data()
    # The file is Latin-1, which its pound signs show.
    texts = [line for line in (folder / "lee.cor").read_text(encoding="latin-1").splitlines() if line.strip()]
    grades = np.loadtxt(folder / "similarities0-1.txt", ndmin=2)
    if len(texts) != _DOCUMENTS or grades.shape != (_DOCUMENTS, _DOCUMENTS):
        raise DataError(
            f"{LEE}: gensim's test data in {str(folder)!r} holds {len(texts)} documents and grades of shape "
            f"{grades.shape}, where {_DOCUMENTS} of each are expected. Reinstall gensim, or leave {LEE} out."
        )
    first, second = np.triu_indices(_DOCUMENTS, k=1)
    return [texts[i] for i in first], [texts[i] for i in second], grades[first, second]


def check_lee() -> None:
    """Refuse a set that is not there, without reading it.

    Raises:
        DataError: gensim is not installed, or lacks the files.
    """
    _test_data()


def _test_data() -> Path:
    spec = find_spec("gensim")
    folder = Path((list(spec.submodule_search_locations or []) or [""])[0] if spec else "", "test", "test_data")
    if not spec or not all((folder / name).is_file() for name in ("lee.cor", "similarities0-1.txt")):
        raise DataError(
            f"{LEE} is read from the test data of the package gensim, which "
            f"{f'is not in {str(folder)!r}' if spec else 'is not installed'}. {REMEDY}, or leave {LEE} out."
        )
    return folder
