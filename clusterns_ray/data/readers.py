"""Rows of files: text lines, csv, tsv, JSON lines and parquet.

Every reader yields each row once, numbered from 1 by the line it begins on (parquet: by the row), or raises a DataError
that names the file and the line. Text is UTF-8, with or without a byte-order mark; a line ends in LF, CRLF or CR, and
in no other character.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clusterns_ray.errors import DataError, first_line
from clusterns_ray.io.paths import check_regular_file

LONGEST_RECORD = 1 << 26
"""Characters of a line of csv, tsv or JSON; a longer one is refused."""

SET_COLUMN = "set text_column (or document_column) to one of them"
_PARQUET_ROWS = 8192
_ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32", "UTF-32"),
    (b"\xff\xfe", "UTF-16", "UTF-16"),
    (b"\xfe\xff", "UTF-16", "UTF-16"),
)
_FORMATS = (
    (b"\x1f\x8b", "gzip", "give it a name that ends in .gz"),
    (b"BZh", "bzip2", "give it a name that ends in .bz2"),
    (b"\x28\xb5\x2f\xfd", "zstd", "give it a name that ends in .zst"),
    (b"PAR1", "parquet", "give it a name that ends in .parquet"),
    (b"\xfd7zXZ", "xz", "decompress it: xz -d"),
    (b"PK\x03\x04", "zip (as .xlsx and .docx are)", "unpack it, or save it as text or csv"),
    (b"%PDF-", "PDF", "save its text as a text file"),
)
_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


# Text


def text_lines(
    stream: io.BufferedReader, name: str, longest: int = LONGEST_RECORD, *, cut: bool = False, first: int = 1
) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, decoded.

    Args:
        name: of the file, for messages.
        longest: characters of a line, at most.
        cut: keep the first ``longest`` characters (from the first that is not white space on) of a longer line, rather
            than refuse it.
        first: the number of the first line; above 1 the stream begins within the file.

    Raises:
        DataError: the file is not UTF-8 text, holds a NUL character, or a line is too long.
    """
    if first == 1:
        _check_start(stream.peek(16)[:16], name)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    held = ""
    for number in itertools.count(first):
        line, held = _piece(text, held, longest, name, number)
        if not line:
            return
        piece = line
        while len(piece) >= longest and not piece.endswith(("\n", "\r")):
            if not cut:
                raise DataError(
                    f"{name}:{number}: the line has more than {longest:,} characters, too many for one row; is the "
                    "file one array, or are line ends missing? Write a row a line"
                )
            piece, held = _piece(text, held, longest, name, number)
            if not line.strip():
                line = piece
        # Files with byte-order marks that were joined have them within; a word joiner at a line's start means nothing.
        yield number, line.lstrip("\ufeff")


def _piece(text: io.TextIOWrapper, held: str, longest: int, name: str, number: int) -> tuple[str, str]:
    """A line, or the part of it that fits, and what was read beyond it to see whether LF follows CR."""
    line, held = held or text.readline(longest), ""
    if len(line) >= longest and line.endswith("\r"):
        held = text.readline(longest)
        if held == "\n":
            line, held = line + held, ""
    _check_text(line, name, number)
    return line, held


def decode(raw: bytes, name: str) -> str:
    """A whole file as text, every line ending in LF alone.

    Raises:
        DataError: it is not UTF-8 text, or holds a NUL character.
    """
    lines = text_lines(io.BufferedReader(io.BytesIO(raw)), name, max(len(raw), 1) + 1)  # type: ignore[arg-type]
    return "".join(_without_end(line) + "\n" for _, line in lines)


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The numbered lines of a small file, without their ends.

    Raises:
        ConfigError: there is no such file, or it is not a regular one.
        DataError: it cannot be read, or as :func:`text_lines`.
    """
    check_regular_file("The file", path)
    try:
        with Path(path).expanduser().open("rb") as stream:
            return [(number, _without_end(line)) for number, line in text_lines(stream, str(path))]
    except OSError as error:
        raise DataError(
            f"{path}: reading failed: {error.strerror or error}; check that this user may read it"
        ) from None


def check_characters(text: str, where: str) -> None:
    """Refuse what is not text: NUL, and half of a surrogate pair, which no file can store.

    Raises:
        DataError: it names ``where``.
    """
    if "\0" in text:
        raise DataError(f"{where}: the text holds a NUL character, which is not text; repair or remove the row")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where}: the text holds half of a surrogate pair ({text[error.start]!r}), which is not a character; "
                "repair or remove the row"
            ) from None


def _without_end(line: str) -> str:
    return line[:-2] if line.endswith("\r\n") else line[:-1] if line.endswith(("\n", "\r")) else line


def _check_start(start: bytes, name: str) -> None:
    for mark, encoding, option in _ENCODINGS:
        if start.startswith(mark):
            raise _other_encoding(name, f"{encoding} (it begins with that byte-order mark)", option)
    for mark, kind, remedy in _FORMATS:
        if start.startswith(mark) and (kind == "PDF" or any(byte < 9 or byte > 126 for byte in start)):
            raise DataError(f"{name}: the file is {kind}, not text, whatever its name says; {remedy}")
    even, odd = start[0:8:2], start[1:8:2]
    if len(start) >= 4 and set(start[:8]) != {0} and (set(odd) == {0} or set(even) == {0}):
        if len(start) >= 8 and start.count(0) >= 3 * len(start) // 4 - 1:
            encoding = "UTF-32LE" if start[0] else "UTF-32BE"
        else:
            encoding = "UTF-16LE" if set(odd) == {0} else "UTF-16BE"
        raise _other_encoding(name, f"{encoding}, as its NUL bytes show", encoding)


def _other_encoding(name: str, what: str, option: str) -> DataError:
    return DataError(
        f"{name}: the file is {what}, and text is read as UTF-8; convert it: iconv -f {option} -t UTF-8 FILE > NEW"
    )


def _check_text(text: str, name: str, number: int) -> None:
    if "\0" in text:
        raise DataError(
            f"{name}:{number}: the line holds a NUL character, which is not text; if the file is UTF-16, convert it: "
            "iconv -f UTF-16 -t UTF-8 FILE > NEW; if they mean nothing, remove them: tr -d '\\000' < FILE > NEW"
        )
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _not_utf8(text, name, number) from None


def _not_utf8(text: str, name: str, number: int) -> DataError:
    raw = text.encode("utf-8", "surrogateescape")
    try:
        raw.decode("utf-8")
        raise AssertionError("the bytes are UTF-8 after all")
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        guess = "WINDOWS-1252" if 0x80 <= byte < 0xA0 else "LATIN1"
        return DataError(
            f"{name}:{number}: byte 0x{byte:02x} is not UTF-8 ({error.reason}), and text is read as UTF-8; re-encode "
            f"the file from the encoding that it has, e.g. iconv -f {guess} -t UTF-8 FILE > NEW"
        )


# Tables


def csv_rows(
    lines: Iterator[tuple[int, str]], name: str, columns: Sequence[str], remedy: str = SET_COLUMN
) -> Iterator[tuple[int, list[str] | None]]:
    """The values of some columns of a csv file with a header; None for a blank row.

    Fields are quoted as RFC 4180 has it, so that a field may hold line ends.

    Args:
        remedy: what to do where a column is missing.

    Raises:
        DataError: a column is missing or there twice, a row has more or fewer fields than the header, its quotes do not
            close, or it may be one row or two.
    """
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST_RECORD))
    ends = _LineEnds(lines)
    rows = csv.reader((line for _, line in ends), strict=True)
    began = 1
    try:
        header = next((row for row in rows if row), [])
        places = _places(header, name, columns, ",", remedy)
        while True:
            began = rows.line_num + 1
            row = next(rows, None)
            if row is None:
                return
            if row and len(row) != len(header):
                raise _ragged(name, began, len(row), len(header), ",")
            if len(row) == 1:
                ends.check(name, began)
            yield began, [row[place] for place in places] if row else None
    except csv.Error as error:
        raise DataError(
            f"{name}:{began}: the row that begins here is malformed ({error}), so it cannot be split into "
            'fields; close its quotes, and double quotes within quotes ("")'
        ) from None


class _LineEnds:
    """Numbered lines, and by what those that are a row of one field ended: in such a file a stray CR would cut a row in
    two, which no count of fields shows."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines, self._line, self._first = lines, "", ""

    def __iter__(self) -> Iterator[tuple[int, str]]:
        for number, line in self._lines:
            self._line = line
            yield number, line

    def check(self, name: str, began: int) -> None:
        """Refuse a row that ends in CR where rows before it end in LF, or the other way round."""
        end = self._line[-1:] if self._line.endswith(("\n", "\r")) else self._first
        self._first = self._first or end
        if end != self._first:
            raise DataError(
                f"{name}:{began}: some rows end in LF, and others in CR alone, so a CR within a row looks like the "
                "end of one; put fields that hold CR in quotes, or make all ends alike: "
                "tr '\\r' '\\n' < FILE > NEW"
            )


def tsv_rows(
    lines: Iterator[tuple[int, str]], name: str, columns: Sequence[str]
) -> Iterator[tuple[int, list[str] | None]]:
    """The values of some columns of a tsv file with a header, a row a line; None for a blank line.

    Some programs write tsv with quotes around fields, and others without: a field that is wholly in quotes on its line
    is read without them, and any other quote is a character like others. A quote never joins lines. Where lines that
    are rows of their own could as well be one row in quotes, the file is refused.

    Raises:
        DataError: as :func:`csv_rows`, or it is ambiguous.
    """
    header: list[str] | None = None
    places: list[int] = []
    opened, before = 0, 0
    ends = _LineEnds(lines)
    for number, raw in ends:
        line = _without_end(raw)
        if not line.strip():
            if header is not None:
                yield number, None
            continue
        if opened and (quote := _closing_quote(line, 0)) >= 0:
            closes = line[quote + 1 : quote + 2] in ("", "\t")
            if closes and before + 1 + line.count("\t", quote) == len(header or ()):
                raise DataError(
                    f"{name}:{opened}: a field opens a quote here that line {number} closes, which is one row over "
                    f"several lines or rows with stray quotes; take out the quotes of lines {opened} and {number}, or "
                    "write the file as .csv or .jsonl, where a field may hold quotes and line ends"
                )
            opened = 0
        quoted, left_open = _split_quoted(line)
        plain = line.split("\t")
        if header is None:
            header = quoted or plain
            places = _places(header, name, columns, "\t")
            continue
        fields = quoted if quoted is not None and len(quoted) == len(header) else plain
        if len(fields) != len(header):
            raise _ragged(name, number, len(fields), len(header), "\t", opened)
        if left_open is not None and not opened:
            opened, before = number, left_open
        if len(fields) == 1:
            ends.check(name, number)
        yield number, [fields[place] for place in places]
    if header is None:
        _places([], name, columns, "\t")


def _split_quoted(line: str) -> tuple[list[str] | None, int | None]:
    """The fields of a line whose quotes are those of a table, else None; and how many come before a field whose quote
    the line does not close, else None."""
    fields: list[str] = []
    at = 0
    while True:
        if line.startswith('"', at):
            end = _closing_quote(line, at + 1)
            if end < 0:
                return None, len(fields)
            if line[end + 1 : end + 2] not in ("", "\t"):
                return None, None
            fields.append(line[at + 1 : end].replace('""', '"'))
            at = end + 1
        else:
            end = line.find("\t", at)
            end = len(line) if end < 0 else end
            fields.append(line[at:end])
            at = end
        if at >= len(line):
            return fields, None
        at += 1


def _closing_quote(line: str, start: int) -> int:
    """Where the first quote is that is not doubled; -1 where there is none."""
    while (at := line.find('"', start)) >= 0:
        if line[at + 1 : at + 2] != '"':
            return at
        start = at + 2
    return -1


def _places(
    header: list[str], name: str, columns: Sequence[str], delimiter: str, remedy: str = SET_COLUMN
) -> list[int]:
    """Where the columns are."""
    for column in columns:
        if header.count(column) > 1:
            raise _twice(name, column, header)
        if column not in header:
            raise no_column(name, column, header, _other_delimiter(header, column, delimiter) or remedy)
    return [header.index(column) for column in columns]


def _other_delimiter(header: list[str], column: str, delimiter: str) -> str:
    """The remedy where the header is split by another delimiter; empty where it is not."""
    whole = delimiter.join(header)
    for other, word in _DELIMITERS.items():
        if other == delimiter or column not in next(csv.reader([whole], delimiter=other), []):
            continue
        said = f"its fields are split by {word}, but it is read with {_DELIMITERS[delimiter]}; "
        if other in ",\t":
            return said + f"give it a name that ends in {'.csv' if other == ',' else '.tsv'}"
        return said + (
            'convert it: python -c "import csv, sys; csv.writer(sys.stdout).writerows(csv.reader(sys.stdin, '
            f"delimiter='{other}'))\" < FILE > NEW.csv"
        )
    return ""


def _ragged(name: str, number: int, fields: int, expected: int, delimiter: str, opened: int = 0) -> DataError:
    quotes = (
        f"a field opens a quote on line {opened}, and quotes do not join lines of tsv: write the file as .csv"
        if opened
        else f"quote fields that hold {delimiter!r}, or repair the row"
    )
    return DataError(f"{name}:{number}: the row has {fields} fields, but the header has {expected}; {quotes}")


def _twice(where: str, column: str, names: Sequence[str]) -> DataError:
    return DataError(
        f"{where}: {column!r} is there {list(names).count(column)} times, so it is not clear which is meant; rename or "
        "remove all but one"
    )


def no_column(where: str, column: str, names: Sequence[str], remedy: str = SET_COLUMN) -> DataError:
    """The error for a column or field that is not there."""
    there = ", ".join(map(repr, names)) or "none"
    return DataError(f"{where}: there is no column {column!r}; the columns are: {there}; {remedy}")


# JSON lines


def json_rows(
    lines: Iterator[tuple[int, str]], name: str, fields: Sequence[str], *, begun: bool = False
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The objects of a file with one JSON object a line; None for a blank line.

    Args:
        fields: that matter, and may not be in an object twice.
        begun: whether there are lines before these.

    Raises:
        DataError: a line is no JSON object, or has such a field twice.
    """
    first = not begun
    for number, line in lines:
        if not line.strip():
            yield number, None
            continue
        if first and line.lstrip().startswith("["):
            raise DataError(
                f"{name}:{number}: the file is a JSON array, or a line holds a JSON list, but each line must be an "
                "object of its own; write the file as JSON lines: jq -c '.[]' FILE > NEW.jsonl"
            )
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            several = first and line.lstrip().startswith("{")
            raise DataError(
                f"{name}:{number}: invalid JSON ({error}), and each line must be a JSON object of its own; "
                + (
                    "if an object is written over several lines: jq -c . FILE > NEW.jsonl"
                    if several
                    else "repair the line, or write the file as JSON lines, e.g. jq -c '.[]' FILE > NEW.jsonl"
                )
            ) from None
        first = False
        if not isinstance(record, dict):
            raise DataError(
                f"{name}:{number}: the line holds a JSON {type(record).__name__}, but each line must be an "
                f'object such as {{"{fields[0]}": "..."}}; write the file as JSON lines, e.g. jq -c \'.[]\''
            )
        _check_fields_once(line, f"{name}:{number}", fields)
        yield number, record


def _check_fields_once(line: str, where: str, fields: Sequence[str]) -> None:
    """Refuse a field that is there twice, of which the json module would silently keep the last."""
    if "\\u" not in line and all(line.count(json.dumps(field, ensure_ascii=False)) < 2 for field in fields):
        return
    pairs: list[tuple[str, Any]] = json.loads(line, object_pairs_hook=list)
    names = [name for name, _ in pairs]
    for field in fields:
        if names.count(field) > 1:
            raise _twice(where, field, names)


def text_of(record: Any, where: str, field: str) -> str | None:
    """The text in a field of a record, None for a null.

    Raises:
        DataError: the field is not there, or holds no text.
    """
    if field not in record:
        raise no_column(where, field, list(record))
    text = record[field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise DataError(
            f"{where}: field {field!r} holds {str(text)[:80]!r} of type {type(text).__name__}, but "
            "sentences are strings; convert it, or name another text_column"
        )
    check_characters(text, where)
    return text


# Parquet


def document_of(value: Any, where: str, column: str | None, number: int) -> str | int:
    """What identifies the document of a row: the value of its column, or without a column the row's own number.

    Raises:
        DataError: the value is neither a text nor a whole number.
    """
    if column is None:
        return number
    if isinstance(value, str | int) and value != "":
        return value
    raise DataError(
        f"{where}: column {column!r} holds {str(value)[:80]!r} of type {type(value).__name__}, but a document is named "
        "by a text or a whole number; fill it in, convert it, or name another document_column"
    )


def parquet_rows(
    handle: Any,
    name: str,
    column: str,
    document_column: str | None = None,
    groups: Sequence[int] | None = None,
    first: int = 1,
) -> Iterator[tuple[int, str | None, str | int]]:
    """The values of a column of strings, also large or dictionary-encoded ones, None for a null; each with what
    :func:`document_of` gives.

    Args:
        groups: the row groups to read; all if not given.
        first: the number of the first row.

    Raises:
        DataError: it is no whole parquet file, or has no such column, several, or one of another type.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(handle)
        names = file.schema_arrow.names
        columns = [column] if document_column is None else [column, document_column]
        for each in columns:
            if each not in names:
                raise no_column(name, each, names)
            if names.count(each) > 1:
                raise _twice(name, each, names)
        kind = file.schema_arrow.field(column).type
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
            raise DataError(
                f"{name}: column {column!r} has type {kind}, but sentences are strings; name a column "
                "of strings as text_column, or convert it"
            )
        number = first - 1
        groups = range(file.num_row_groups) if groups is None else groups
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, row_groups=list(groups), columns=columns):
            # By its name: "text" also selects "text.en".
            values = [batch.column(batch.schema.get_field_index(each)).to_pylist() for each in columns]
            for text, document in zip(values[0], values[-1], strict=True):
                number += 1
                yield number, text, document_of(document, f"{name} row {number}", document_column, number)
        read, there = number - first + 1, sum(file.metadata.row_group(group).num_rows for group in groups)
        if read != there:
            raise DataError(f"{name}: {read} rows were read of {there}; write the file again")
    except (DataError, GeneratorExit):
        raise
    except Exception as error:  # damaged files make the library raise errors of many kinds
        raise DataError(
            f"{name}: the parquet file cannot be read ({first_line(error)}); write it again, or correct its suffix"
        ) from None
