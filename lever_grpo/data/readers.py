"""From a file to its raw records, with flat memory. What a record means is decided in `formats.py`, not here.

The layout is found from the content, never from the file's name:

* `parquet`: starts with the magic bytes `PAR1`;
* `object`: one JSON object whose keys are query ids or `_`-prefixed metadata (formats 1 to 3), parsed as a stream;
* `array`: one JSON list of records;
* `lines`: one JSON record a line (format 4).

JSON may be gzipped. No file of JSON is read whole: objects and arrays are cut at their commas into one text a record.
"""

from __future__ import annotations

import gzip
import json
import re
import reprlib
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import simdjson

from .records import BeamDataError


Record = tuple[str | None, str, Any]  # key, label, content
HEAD_BYTES = 1 << 16
_FIRST_KEY = re.compile(rb'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
# a key of a log, in the plain form that all writers use; and any
_KEY = re.compile(rb'"(\d+|_[^"\\\x00-\x1f]*)"[ \t\r\n]*:')
_NAME = re.compile(rb'\s*("(?:[^"\\]|\\.)*")\s*:')
_STEPS = np.zeros(256, dtype=np.int64)  # of levels, at each byte
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1
_BLANKS = b" \t\r\n"
BLOCK_BYTES = 1 << 18
MAX_RECORD_BYTES = 1 << 24
# what `lever-grpo generate` and the sample have in a log's folder beside it
BESIDE_LOGS = ("manifest.json", "failures.json", "encoders.json")
DAMAGED = "is the file damaged, or cut short?"
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
        yield from ((None, label, line) for label, line in iter_lines(path))
    elif layout == "array":
        for i, record in enumerate(_iter_members(path)):
            yield None, f"record {i}", record
    else:
        seen = _Seen()
        for key, record in _iter_object(path):
            label = f"record '{key if len(key) <= 40 else key[:37] + '...'}'"
            if not seen.add(key):
                raise BeamDataError(
                    f"{path}: {label}: expected each query once, found the key twice; merge the two records into one"
                )
            yield key, label, record


class _Seen:
    """The keys of a log so far. Row ids, as they mostly are, take a bit each, in words of `IDS`."""

    IDS = 512

    def __init__(self) -> None:
        self.words: dict[int, int] = {}
        self.others: set[str] = set()

    def add(self, key: str) -> bool:
        """Whether it is new."""
        if not key.isdecimal() or len(key) > 19 or str(number := int(key)) != key:
            new = key not in self.others
            self.others.add(key)
            return new
        place, bit = number // self.IDS, 1 << number % self.IDS
        word = self.words.get(place, 0)
        self.words[place] = word | bit
        return not word & bit


def load_text(path: str, text: Record) -> Record:
    """A record of `iter_texts`, parsed.

    Raises:
        [`BeamDataError`]: it is no JSON, or names a field twice.
    """
    key, label, record = text
    if not isinstance(record, bytes):
        return text
    place = f"{path}: {label}"
    if label.startswith("line"):
        keyed = "a keyed log must have row indices (or _metadata) as its keys"
        record = parse_json(record, place, "one JSON record a line", keyed)
    else:
        record = parse_json(record, place)
    if key is None and isinstance(record, dict) and "query_id" in record:
        label += f", query {reprlib.repr(record['query_id'])}"
    return key, label, record


def parse_json(text: bytes, place: str, expected: str = "valid JSON", fix: str = DAMAGED) -> Any:
    """The value of a JSON text; NaN, infinities and whole numbers of any size are let through, as Python writes them.

    Args:
        text (`bytes`):
            In UTF-8.
        place (`str`):
            The file and the record, for errors.
        expected, fix (`str`, *optional*):
            What it should be, and what to do when it is no JSON.

    Raises:
        [`BeamDataError`]: it is no JSON, or an object in it names a field twice, of which JSON itself would silently
            keep the last.

    Example:

    ```python
    >>> from lever_grpo.data.readers import parse_json
    >>> parse_json(b'{"scores": [1.0, NaN]}', "log.jsonl: line 1")
    {'scores': [1.0, nan]}
    >>> parse_json(b'[{"score": 1, "score": 9}]', "log.jsonl: line 2")
    Traceback (most recent call last):
    lever_grpo.data.records.BeamDataError: log.jsonl: line 2, field 'score': expected it once, found it twice

    ```
    """
    try:
        value = orjson.loads(text)
        if names_once(text, value):
            return value
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # the second: of more levels than can be written
        pass
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique_names)
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    except BeamDataError as error:
        raise BeamDataError(f"{place}, {error}") from None
    except (ValueError, RecursionError) as error:
        raise BeamDataError(f"{place}: expected {expected}, found invalid JSON ({error}); {fix}") from None
    return value


def names_once(text: bytes, value: Any) -> bool:
    """Whether no object of a JSON text names a field twice, told from the `value` that orjson found there; quick.

    Each name has a colon behind it, which is not there any more when the value is written. False where colons are
    escaped, too.
    """
    return orjson.dumps(value).count(b":") == text.count(b":") and b"\\u003" not in text


def iter_lines(path: str) -> Iterator[tuple[str, bytes]]:
    """The lines of a file that are not blank, with their names in errors; a line has a bounded size."""
    with open_binary(path) as stream:
        lines = iter(lambda: stream.readline(MAX_RECORD_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_RECORD_BYTES:
                raise _too_large(path, f"line {number}")
            if line.strip():
                yield f"line {number}", line


def _iter_object(path: str) -> Iterator[tuple[str, bytes]]:
    """Keys and values of a file that is one JSON object; values are JSON text.

    The file is cut where something looks like a key. If every piece is one JSON value and a comma, the cuts are right,
    as JSON can be read in one way only. If a piece is not (it was the key of an object inside, or a string that looks
    like one; or the file is damaged, or holds NaN), the slower cutting takes over from that record on.
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
    for i, member in enumerate(islice(_iter_members(path), done, None), start=done):
        name = _NAME.match(member)
        try:
            key = orjson.loads(name[1]) if name else None
        except orjson.JSONDecodeError:
            key = None
        if name is None or key is None:
            raise BeamDataError(
                f"{path}: expected valid JSON, found no key after {i} records; the file is damaged or cut short"
            )
        yield key, member[name.end() :]


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


def _iter_members(path: str) -> Iterator[bytes]:
    """What stands between the outermost brackets and commas of a file of JSON, each text as it is.

    The file is valid JSON just if all of these are, which whoever parses them finds out.
    """
    level, inside, half = 1, 0, b""  # inside a string; a backslash whose other half is in the next block
    done, size = 0, 0
    parts: list[bytes] = []  # of the open one
    with open_binary(path) as stream:
        while (opening := stream.read(1)).isspace():
            pass
        while block := stream.read(BLOCK_BYTES):
            text = plain = half + block
            half = b""
            if b"\\" in text:
                plain = re.sub(rb"\\.", b"__", text, flags=re.DOTALL)
                if plain.endswith(b"\\"):
                    text, plain, half = text[:-1], plain[:-1], b"\\"
            code = np.frombuffer(plain, dtype=np.uint8)
            marks = np.flatnonzero((code == 34) | (code == 91) | (code == 93) | (code == 123) | (code == 125))  # "[]{}
            code = code[marks]
            insides = (np.cumsum(code == 34) + inside) % 2
            levels = np.cumsum(np.where(insides, 0, _STEPS[code])) + level
            ends = [*marks.tolist(), len(text)]
            gaps = np.flatnonzero((levels == 1) & (insides == 0)).tolist()  # behind which marks the commas may be
            start = 0
            for begin, end in [(0, ends[0])] * (level == 1 and not inside) + [(ends[i], ends[i + 1]) for i in gaps]:
                while (comma := plain.find(b",", begin, end)) >= 0:
                    yield b"".join((*parts, text[start:comma]))
                    start = begin = comma + 1
                    done, parts, size = done + 1, [], 0
            parts.append(text[start:])
            size += len(parts[-1])
            if size > MAX_RECORD_BYTES:
                raise _too_large(path, f"record {done}")
            if len(marks):
                level, inside = int(levels[-1]), int(insides[-1])
    last, closing = b"".join((*parts, half)).rstrip(), b"}" if opening == b"{" else b"]"
    if level or not last.endswith(closing):
        raise BeamDataError(
            f"{path}: expected valid JSON up to its last {closing.decode()!r}, found something else after {done} "
            "records; the file is damaged or cut short"
        )
    if done or last[:-1].strip():
        yield last[:-1]


def _too_large(path: str, label: str) -> BeamDataError:
    return BeamDataError(
        f"{path}: {label}: expected records of at most {MAX_RECORD_BYTES:,} bytes, found a larger one; "
        "divide its sequences over several queries, or thin them"
    )


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BeamDataError(f"field {twice!r}: expected it once, found it twice")
    return result


def _iter_parquet(path: str) -> Iterator[tuple[None, str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise BeamDataError(f"{path}: expected each column once, found {twice} twice")
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
            matches = sorted(
                p
                for p in path.iterdir()
                if p.name.endswith((".json", ".jsonl", ".parquet", ".gz"))
                and not p.name.startswith(".")
                and p.name not in BESIDE_LOGS
            )
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
