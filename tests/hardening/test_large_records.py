"""One record as large as a file: refused by a rule, with bounded memory. With `pytest -m slow` it has a gigabyte."""

import gzip
import os

import pytest
from corpus import lever_lm, more_memory_than, put

from lever_grpo.data import BeamDataError, load_beams, load_examples, load_vqa
from lever_grpo.data.pools import PoolSource, read_external_ids


MEGABYTE = 1 << 20
FRAMES = {
    "line.jsonl": ('{"query_id": 7, "pool": [1], "sequences": [], "note": "', '"}\n'),
    "object.json": ('{"7": {"candidate_ids": [1], "id_list": [], "score_list": [], "note": "', '"}}'),
    "array.json": ('[{"query_id": 7, "pool": [1], "sequences": [], "note": "', '"}]'),
    "task.jsonl": ('{"id": 0, "question": "?", "answer": "', '"}\n'),
    "pools.json": ('{"7": ["', '"]}'),
    "ids.json": ('{"7": "', '"}'),
}
READ = {
    "task.jsonl": load_examples,
    "pools.json": lambda path: PoolSource(path)(7),
    "ids.json": read_external_ids,
}


def write(path, frame, megabytes):
    parts = [part.encode() for part in (frame[0], "x" * MEGABYTE, frame[1])]
    if path.suffix == ".gz":  # of several parts, which unpack one after another
        parts = [gzip.compress(part, mtime=0) for part in parts]
    with open(path, "wb") as stream:
        stream.write(parts[0])
        for _ in range(megabytes):
            stream.write(parts[1])
        stream.write(parts[2])


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FRAMES)
@pytest.mark.parametrize("megabytes", [24, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_record_of_any_size_is_refused(tmp_path, name, packed, megabytes):
    path = tmp_path / (name + ".gz" * packed)
    write(path, FRAMES[name], megabytes)
    with (
        more_memory_than(256 * MEGABYTE),
        pytest.raises(BeamDataError, match=rf"{name}.*: expected records of at most 16,777,216 bytes"),
    ):
        READ[name](path) if name in READ else list(load_beams(path, cache_dir=tmp_path / "cache", streaming=True))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_file_that_is_read_whole_has_a_largest_size(tmp_path, packed):
    path = tmp_path / "questions.json"
    path.touch()
    if packed:
        path.write_bytes(gzip.compress(bytes(16 * MEGABYTE), 1, mtime=0) * 65)
    else:
        os.truncate(path, 1025 * MEGABYTE)
    with (
        more_memory_than(64 * MEGABYTE),
        pytest.raises(BeamDataError, match="questions.json: expected a file of at most 1,073,741,824 bytes"),
    ):
        load_vqa(path, path)


@pytest.mark.parametrize("layout", ["object", "array"])
def test_a_nan_does_not_make_a_file_be_read_whole(tmp_path, layout):
    """Nor does a key of digits inside a record, behind which an object is cut in another way."""
    path = tmp_path / "log.json"
    records = [
        lever_lm(query, note="x" * MEGABYTE, more={"5": "@"} if query == 100 else {}) for query in range(100, 148)
    ]
    texts = [put("NaN", {"query_id": query, **record}) for query, record in enumerate(records, start=100)]
    if layout == "object":
        path.write_text("{" + ",".join(f'"{query}": {text}' for query, text in enumerate(texts, start=100)) + "}")
    else:
        path.write_text("[" + ",".join(texts) + "]")
    del records, texts
    with more_memory_than(64 * MEGABYTE):
        assert sum(1 for _ in load_beams(path, cache_dir=tmp_path / "cache", streaming=True)) == 48


def test_many_records_of_a_large_file_need_little_memory(tmp_path):
    path = tmp_path / "log.jsonl"
    line = b'{"query_id": %d, "pool": [1], "sequences": [{"prompt_order": [1], "score": 1.0}], "note": "%s"}\n'
    with open(path, "wb") as stream:
        for query in range(2, 50):
            stream.write(line % (query, b"x" * MEGABYTE))
    with more_memory_than(256 * MEGABYTE):
        assert sum(1 for _ in load_beams(path, cache_dir=tmp_path / "cache", streaming=True)) == 48
