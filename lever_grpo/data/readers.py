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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import ijson
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from .records import BeamDataError


HEAD_BYTES = 1 << 16
_FIRST_KEY = re.compile(rb'\{\s*"((?:[^"\\]|\\.)*)"\s*:')
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
    except (OSError, EOFError) as error:
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


def iter_records(path: str) -> Iterator[tuple[str | None, str, Any]]:
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
    layout = detect_layout(path)
    if layout == "parquet":
        yield from _iter_parquet(path)
    elif layout == "lines":
        yield from _iter_lines(path)
    elif layout == "array":
        for i, record in enumerate(_iter_json(path, "item")):
            yield None, f"record {i}", record
    else:
        seen: set[str] = set()
        for key, record in _iter_json(path, ""):
            if key in seen:
                raise BeamDataError(
                    f"{path}: record '{key}': expected each query once, found the key twice; "
                    "merge the two records into one"
                )
            seen.add(key)
            yield key, f"record '{key}'", record


def _iter_json(path: str, prefix: str) -> Iterator[Any]:
    done = 0
    try:
        with open_binary(path) as stream:
            parse = ijson.kvitems if prefix == "" else ijson.items
            for item in parse(stream, prefix, use_float=True):
                yield item
                done += 1
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
        except (ValueError, UnicodeDecodeError) as error:
            raise BeamDataError(
                f"{path}: expected valid JSON, found an error after {done} records ({reason}; {error}); "
                "the file is damaged or cut short"
            ) from None
    yield from list(whole.items() if isinstance(whole, dict) else whole)[done:]


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BeamDataError(f"record '{twice}': expected each key once, found the key twice")
    return result


def _iter_lines(path: str) -> Iterator[tuple[None, str, Any]]:
    with open_binary(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                record = orjson.loads(line)
            except orjson.JSONDecodeError:
                try:
                    record = json.loads(line)  # NaN and huge integers: the record's own checks will name the field
                except ValueError as error:
                    raise BeamDataError(
                        f"{path}: line {number}: expected one JSON record a line, found invalid JSON ({error}); "
                        "a keyed log must have row indices (or _metadata) as its keys"
                    ) from None
            label = f"line {number}"
            if isinstance(record, dict) and "query_id" in record:
                label += f", query {record['query_id']!r}"
            yield None, label, record


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
