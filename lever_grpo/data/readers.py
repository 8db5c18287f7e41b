"""From a file to its raw records, with flat memory. What a record means is decided in `formats.py`, not here.

The layout is found from the content, never from the file's name:

* `parquet`: starts with the magic bytes `PAR1`;
* `object`: one JSON object whose keys are query ids or `_`-prefixed metadata (formats 1 to 3), parsed as a stream;
* `array`: one JSON list of records;
* `lines`: one JSON record a line (format 4).

JSON may be gzipped.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import reprlib
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import ijson
import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import simdjson

from .records import BeamDataError


Record = tuple[str | None, str, Any]  # key, label, content
HEAD_BYTES = 1 << 16
_FIRST_KEY = re.compile(rb'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
# a key of a log, in the plain form that all writers use
_KEY = re.compile(rb'"(\d+|_[^"\\\x00-\x1f]*)"[ \t\r\n]*:')
_BLANKS = b" \t\r\n"
BLOCK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 24
MAX_LEVELS = 200  # of brackets: the stream parser takes memory with the square of their number
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_UNPACKING = (EOFError, gzip.BadGzipFile, zlib.error)  # of a gzip file that is cut short or damaged
_UTF8_BOM = b"\xef\xbb\xbf"


def open_binary(path: str) -> IO[bytes]:
    """Open a file for reading, unpacking gzip on the way; a byte order mark is skipped."""
    raw = open(path, "rb")
    magic = raw.read(2)
    raw.seek(0)
    stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if magic == b"\x1f\x8b" else raw
    if stream.read(len(_UTF8_BOM)) != _UTF8_BOM:
        stream.seek(0)
    return stream


def detect_layout(path: str) -> str:
    """One of "parquet", "object", "array", "lines", from the first bytes of the file."""
    with open(path, "rb") as raw:
        if raw.read(4) == b"PAR1":
            return "parquet"
    try:
        with open_binary(path) as stream:
            head = stream.read(HEAD_BYTES).lstrip()
    except (OSError, *_UNPACKING) as error:
        raise BeamDataError(f"{path}: expected a beam log, found a file that cannot be unpacked ({error})") from error
    if not head:
        raise BeamDataError(f"{path}: expected a beam log, found an empty file; was the search interrupted?")
    if head[:1] == b"[":
        return "array"
    key = _FIRST_KEY.match(head)
    if key is None:
        if re.match(rb"\{\s*\}", head):
            return "object"
        raise BeamDataError(
            f"{path}: expected a beam log (JSON, JSON lines or Parquet), found a file that starts with {head[:40]!r}"
        )
    name = key.group(1)
    if name.startswith(b"_"):
        # {"_meta": …} alone on the first line, with another record below it, is a JSON-lines file
        first, newline, rest = head.partition(b"\n")
        return "lines" if newline and _is_complete(first) and rest.lstrip()[:1] == b"{" else "object"
    return "object" if re.fullmatch(rb"[+-]?\d+", name) else "lines"


def _is_complete(text: bytes) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


def iter_records(path: str) -> Iterator[Record]:
    """Yield `(key, label, record)` for every record of a file.

    `key` is the query id as text where the file is one JSON object, else None; `label` names the record in error
    messages. A query that stands in an object twice is an error: JSON itself would silently keep the last.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> from lever_grpo.data.readers import iter_records
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "log.json"
    >>> _ = path.write_text('{"7": {"id_list": [[3, 7]], "score_list": [0.5]}}')
    >>> [(key, label) for key, label, record in iter_records(str(path))]
    [('7', "record '7'")]

    ```
    """
    for text in iter_texts(path):
        yield load_text(path, text)


def iter_texts(path: str) -> Iterator[Record]:
    """The same as `iter_records`, but a record may still be JSON text, as bytes, for `load_text` to parse."""
    try:
        yield from _iter_layout(path, detect_layout(path))
    except _UNPACKING as error:
        raise BeamDataError(f"{path}: expected a beam log, found a file that cannot be unpacked ({error})") from error


def _iter_layout(path: str, layout: str) -> Iterator[Record]:
    if layout == "parquet":
        yield from _iter_parquet(path)
    elif layout == "lines":
        yield from _iter_lines(path)
    elif layout == "array":
        for i, record in enumerate(_iter_json(path, "item")):
            yield None, f"record {i}", record
    else:
        seen: set[str] = set()
        for key, record in _iter_object(path):
            label = f"record '{key if len(key) <= 40 else key[:37] + '...'}'"
            if key in seen:
                raise BeamDataError(
                    f"{path}: {label}: expected each query once, found the key twice; merge the two records into one"
                )
            seen.add(key)
            yield key, label, record


def load_text(path: str, text: Record) -> Record:
    """A record of `iter_texts`, parsed.

    Raises:
        [`BeamDataError`]: a line is no JSON.
    """
    key, label, record = text
    if not isinstance(record, bytes):
        return text
    content: bytes = record
    try:
        record = orjson.loads(content)
        # counting is quick, and a name that stands once can be no field that stands twice
        if isinstance(record, dict) and any(content.count(b'"%b"' % name.encode()) > 1 for name in record):
            json.loads(content, object_pairs_hook=_unique_keys)
    except BeamDataError as error:
        raise BeamDataError(f"{path}: {label}: {error}") from None
    except orjson.JSONDecodeError:
        try:
            record = json.loads(content)  # NaN and huge integers: the record's own checks will name the field
            json.dumps(record, ensure_ascii=False).encode()  # no half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise BeamDataError(
                f"{path}: {label}: expected one JSON record a line, found invalid JSON ({error}); "
                "a keyed log must have row indices (or _metadata) as its keys"
            ) from None
    if key is None and isinstance(record, dict) and "query_id" in record:
        label += f", query {reprlib.repr(record['query_id'])}"
    return key, label, record


def _iter_lines(path: str) -> Iterator[Record]:
    with open_binary(path) as stream:
        lines = iter(lambda: stream.readline(MAX_RECORD_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_RECORD_BYTES:
                raise _too_large(path, f"line {number}")
            if line.strip():
                yield None, f"line {number}", line


def _iter_object(path: str) -> Iterator[tuple[str, Any]]:
    """Keys and values of a file that is one JSON object; values are JSON text as far as possible.

    The file is cut where something looks like a key. If every piece is one JSON value and a comma, the cuts are right,
    as JSON can be read in one way only. If a piece is not (it was the key of an object inside, or a string that looks
    like one; or the file is damaged, or holds NaN), the stream parser takes over from that record on.
    """
    done = 0
    with open_binary(path) as stream:
        try:
            for item in _iter_pieces(stream):
                yield item
                done += 1
            return
        except (ValueError, RuntimeError):  # RuntimeError: a number that simdjson cannot hold
            pass
    yield from islice(_iter_json(path, ""), done, None)


def _iter_pieces(stream: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    check = simdjson.Parser().parse
    key: str | None = None
    rest = b""
    while block := stream.read(BLOCK_BYTES):
        text, start = rest + block, 0
        for match in _KEY.finditer(text):
            piece = text[start : match.start()].rstrip(_BLANKS)
            if key is not None and piece.endswith(b","):
                piece = piece[:-1]
                check(piece)
                yield key, piece
            elif key is not None or piece.lstrip(_BLANKS) != b"{":
                raise ValueError("expected the beginning of an object, or a value and a comma")
            key, start = match.group(1).decode(), match.end()
        rest = text[start:]
        if len(rest) > MAX_RECORD_BYTES:
            raise ValueError("expected shorter values")
    rest = rest.rstrip(_BLANKS)
    if key is None or not rest.endswith(b"}"):
        raise ValueError("expected the end of an object")
    check(rest[:-1])
    yield key, rest[:-1]


def _iter_json(path: str, prefix: str) -> Iterator[Any]:
    done = 0
    try:
        with open_binary(path) as stream:
            parse = ijson.kvitems if prefix == "" else ijson.items
            guarded = _Guarded(stream, path)
            for item in parse(guarded, prefix, use_float=True, buf_size=1 << 18):
                yield item
                done += 1
                guarded.left, guarded.done = MAX_RECORD_BYTES, done
        return
    except ijson.JSONError as error:
        reason = str(error).splitlines()[0]
    # The stream parser stops at NaN, infinities and integers beyond int64, which Python writes and reads. Read such a
    # file whole, so that the record that holds the value is named (or the value passes, if nobody asks for it).
    with open_binary(path) as stream, io.TextIOWrapper(stream, encoding="utf-8") as text:
        try:
            whole = json.load(text, object_pairs_hook=_unique_keys)
        except BeamDataError as error:
            raise BeamDataError(f"{path}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise BeamDataError(
                f"{path}: expected valid JSON, found an error after {done} records ({reason}; {error}); "
                "the file is damaged or cut short"
            ) from None
    yield from list(whole.items() if isinstance(whole, dict) else whole)[done:]


class _Guarded:
    """A stream of JSON for the stream parser, which knows no limits: an error where a record is too large or deep."""

    def __init__(self, stream: IO[bytes], path: str):
        self.stream, self.path, self.done, self.left = stream, path, 0, MAX_RECORD_BYTES
        self.level, self.in_string, self.escape = 0, 0, b""

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise _too_large(self.path, f"record {self.done}")
        text = self.escape + block
        odd = (len(text) - len(text.rstrip(b"\\"))) % 2  # a backslash whose other half is in the next block
        text, self.escape = text[: len(text) - odd], b"\\" * odd
        if b"\\" in text:
            text = re.sub(rb"\\.", b"", text, flags=re.DOTALL)
        pieces = text.split(b'"')  # every other one is the inside of a string
        brackets = b"".join(pieces[self.in_string :: 2]).translate(None, _NO_BRACKETS)
        self.in_string = (self.in_string + len(pieces) - 1) % 2
        if brackets:
            code = np.frombuffer(brackets, dtype=np.uint8)
            levels = self.level + np.cumsum(np.where((code == ord("[")) | (code == ord("{")), 1, -1))
            self.level = int(levels[-1])
            if levels.max() > MAX_LEVELS:
                raise BeamDataError(
                    f"{self.path}: record {self.done}: expected at most {MAX_LEVELS} levels of nesting, found more"
                )
        return block


def _too_large(path: str, label: str) -> BeamDataError:
    return BeamDataError(
        f"{path}: {label}: expected records of at most {MAX_RECORD_BYTES:,} bytes, found a larger one; "
        "divide its sequences over several queries, or thin them"
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BeamDataError(f"record '{twice}': expected each key once, found the key twice")
    return result


def _iter_parquet(path: str) -> Iterator[tuple[None, str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=64):
                for record in batch.to_pylist():
                    yield None, f"row {row}, query {record.get('query_id')!r}", record
                    row += 1
    except (pa.ArrowInvalid, OSError) as error:
        raise BeamDataError(f"{path}: expected a Parquet file, found one that cannot be read ({error})") from error


def local_files(paths: Any) -> list[str]:
    """Absolute paths of the files that a path, a folder, a pattern or a list of these stands for, in a stable order.

    Lever-LM file names hold colons and brackets, so a path that exists is taken as it is and never read as a pattern.
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    found: list[str] = []
    for item in paths:
        path = Path(item).expanduser()
        if path.is_dir():
            matches = sorted(p for p in path.iterdir() if p.name.endswith((".json", ".jsonl", ".parquet", ".gz")))
        elif path.exists():
            matches = [path]
        else:
            root = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
            matches = sorted(root.glob(pattern)) if any(c in pattern for c in "*?[") else []
        if not matches:
            raise FileNotFoundError(f"{item}: expected a beam log, a folder of them or a pattern, found nothing there")
        found += [str(p.absolute()) for p in matches]
    if not found:
        raise FileNotFoundError("expected at least one beam log, found an empty list of paths")
    return found
