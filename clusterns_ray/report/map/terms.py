"""Terms that distinguish the clusters of a corpus: class-based TF-IDF.

Source: Grootendorst, "BERTopic: Neural topic modeling with a class-based TF-IDF procedure", arXiv:2203.05794, 2022,
equation 2. Shape suffixes: N sentences, K clusters, V terms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

WORD = r"[^\W\d_][\w'’-]*\w"
"""A word: it begins with a letter and has two characters or more."""


def distinguishing_terms(texts: Sequence[str], cluster_N: np.ndarray, k: int, n: int = 6) -> list[list[str]]:
    """The ``n`` terms of each cluster with the largest weight, the largest first; of equal weights by the alphabet.

    English function words, and terms that are no more frequent in a cluster than in the whole corpus, are left out.

    Args:
        cluster_N: int, the cluster of each text.
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    vectorizer = CountVectorizer(token_pattern=WORD)
    try:
        counts_NV = vectorizer.fit_transform(texts)
    except ValueError:  # there is no word in all of the texts
        return [[] for _ in range(k)]
    names = vectorizer.get_feature_names_out()
    content = np.array([_stem(name) not in ENGLISH_STOP_WORDS for name in names])
    members_KN = csr_array((np.ones(len(texts)), (cluster_N, np.arange(len(texts)))), shape=(k, len(texts)))
    counts_KV: np.ndarray = csr_array(members_KN @ counts_NV).toarray()
    weights_KV = class_tf_idf(counts_KV)
    share_KV = counts_KV / np.maximum(counts_KV.sum(axis=1, keepdims=True), 1)
    weights_KV[(share_KV <= counts_KV.sum(axis=0) / counts_KV.sum()) | ~content] = 0
    order_KV = np.argsort(-weights_KV, axis=1, kind="stable")[:, :n]
    return [
        [str(names[term]) for term in terms if weights_KV[cluster, term] > 0] for cluster, terms in enumerate(order_KV)
    ]


def _stem(word: str) -> str:
    """A word before its apostrophe; of a negation such as ``don't`` the word ``not``."""
    return "not" if word.endswith(("n't", "n’t")) else re.split("['’]", word)[0]


def class_tf_idf(counts_KV: np.ndarray) -> np.ndarray:
    """``W = tf log(1 + A / f)``: ``tf`` is how often a term occurs in a class, ``f`` how often in all of them, and
    ``A`` the mean number of words in a class. Classes without words do not count.

    Args:
        counts_KV: how often each of V terms, which all occur, is in each of K classes.

    Returns:
        float64 (K, V).
    """
    classes = np.count_nonzero(counts_KV.sum(axis=1))
    return counts_KV * np.log1p(counts_KV.sum() / classes / counts_KV.sum(axis=0))
