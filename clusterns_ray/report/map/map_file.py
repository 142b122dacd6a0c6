"""The map as parquet: a row for each sentence, and facts about the whole in the file's metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from clusterns_ray.errors import ConfigError, DataError, first_line
from clusterns_ray.io.files import checksum_holds, replacing, with_checksum
from clusterns_ray.report.map.corpus_map import CorpusMap

METADATA = b"clusterns_ray_map"
FORMAT = 1


def label(terms: list[str], cluster: int) -> str:
    """A cluster's name for people."""
    return ", ".join(terms[:3]) or f"cluster {cluster}"


def check_replaceable(path: Path) -> None:
    """Refuse a file that is there and is no map, which might be a corpus.

    Raises:
        ConfigError: it is such a file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.exists():
        return
    try:
        is_map = METADATA in (pq.read_schema(path).metadata or {})
    except (OSError, pa.ArrowException):
        is_map = False
    if not is_map:
        raise ConfigError(
            f"-o: the data of the map would go to {str(path)!r}, which is there already and is no map.",
            "Choose another name for the page.",
        )


def write_map(path: Path, corpus_map: CorpusMap) -> None:
    """Replace the file in one step.

    Columns: ``row`` of the corpus, ``text``, ``cluster``, its ``label``, ``cosine`` to its centroid, the
    ``second_cluster``, ``x`` and ``y``; ``x_before`` and ``y_before``, null where the untrained encoder is not known;
    and of each sentence ``false_negatives`` with ``false_negative_cosines`` and ``hard_negatives``, lists of rows of
    this file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    m = corpus_map
    there_NS, n = m.similar_NS >= 0, len(m.texts)
    no_place, no_list = pa.nulls(n, pa.float32()), pa.nulls(n, pa.list_(pa.int32()))
    columns = {
        "row": m.rows_N,
        "text": m.texts,
        "cluster": m.cluster_N.astype(np.int32),
        "label": [label(m.terms[cluster], cluster) for cluster in m.cluster_N.tolist()],
        "cosine": m.cosine_N,
        "second_cluster": m.second_N.astype(np.int32),
        "x": m.xy_N2[:, 0],
        "y": m.xy_N2[:, 1],
        "x_before": no_place if m.before_N2 is None else m.before_N2[:, 0],
        "y_before": no_place if m.before_N2 is None else m.before_N2[:, 1],
        "false_negatives": _lists(m.similar_NS, there_NS, pa.int32()),
        "false_negative_cosines": _lists(m.similar_cosine_NS, there_NS, pa.float32()),
        "hard_negatives": no_list if m.hard_NM is None else _lists(m.hard_NM, m.hard_NM >= 0, pa.int32()),
    }
    facts = with_checksum({**m.facts, "format": FORMAT, "terms": [[number, m.terms[number]] for number in m.terms]})
    table = pa.table(columns).replace_schema_metadata({METADATA: json.dumps(facts)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_map(path: Path) -> CorpusMap:
    """What :func:`write_map` wrote.

    Raises:
        DataError: it is damaged, or another version's.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        facts = json.loads((table.schema.metadata or {})[METADATA])
        if not checksum_holds(facts) or facts["format"] != FORMAT:
            raise ValueError("its metadata are not those that were written")
        column = {name: table.column(name) for name in table.column_names}
        similar = column["false_negatives"].to_pylist()
        width = max(map(len, similar))
        before = None if column["x_before"].null_count else _plane(column["x_before"], column["y_before"])
        hard = None if column["hard_negatives"].null_count else column["hard_negatives"].to_pylist()
        return CorpusMap(
            texts=column["text"].to_pylist(),
            rows_N=column["row"].to_numpy(),
            xy_N2=_plane(column["x"], column["y"]),
            before_N2=before,
            cluster_N=column["cluster"].to_numpy().astype(np.int64),
            cosine_N=column["cosine"].to_numpy(),
            second_N=column["second_cluster"].to_numpy().astype(np.int64),
            similar_NS=_rectangle(similar, width, -1),
            similar_cosine_NS=_rectangle(column["false_negative_cosines"].to_pylist(), width, 0.0).astype(np.float32),
            hard_NM=None if hard is None else _rectangle(hard, max(map(len, hard)), -1),
            terms=dict(facts["terms"]),
            facts={key: facts[key] for key in facts if key not in ("format", "terms", "checksum")},
        )
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: it is not a map of this version, or damaged ({first_line(error)[:200]}).",
            "Make it again with clusterns map, or remove it.",
        ) from None


def _plane(x: Any, y: Any) -> np.ndarray:
    return np.stack([x.to_numpy(), y.to_numpy()], axis=1).astype(np.float32)


def _lists(values_NS: np.ndarray, there_NS: np.ndarray, kind: Any) -> Any:
    """The values that are there, as a column of lists."""
    import pyarrow as pa

    offsets = np.concatenate([[0], there_NS.sum(axis=1).cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(values_NS[there_NS], kind))


def _rectangle(rows: list[list[Any]], width: int, filler: float) -> np.ndarray:
    return np.array([row + [filler] * (width - len(row)) for row in rows]).reshape(len(rows), width)
