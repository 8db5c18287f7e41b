"""One record as large as a file: refused by a rule, with bounded memory. `pytest -m slow` makes it a gigabyte."""

import gzip

import pytest
from corpus import more_memory_than

from lever_grpo.data import BeamDataError, load_beams


MEGABYTE = 1 << 20
FRAMES = {
    "line.jsonl": ('{"query_id": 7, "pool": [1], "sequences": [], "note": "', '"}\n'),
    "object.json": ('{"7": {"candidate_ids": [1], "id_list": [], "score_list": [], "note": "', '"}}'),
    "array.json": ('[{"query_id": 7, "pool": [1], "sequences": [], "note": "', '"}]'),
}


def write(path, frame, megabytes):
    begin, end = frame
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as stream:
        stream.write(begin.encode())
        for _ in range(megabytes):
            stream.write(b"x" * MEGABYTE)
        stream.write(end.encode())


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
        list(load_beams(path, cache_dir=tmp_path / "cache", streaming=True))


def test_many_records_of_a_large_file_need_little_memory(tmp_path):
    path = tmp_path / "log.jsonl"
    line = b'{"query_id": %d, "pool": [1], "sequences": [{"prompt_order": [1], "score": 1.0}], "note": "%s"}\n'
    with open(path, "wb") as stream:
        for query in range(2, 50):
            stream.write(line % (query, b"x" * MEGABYTE))
    with more_memory_than(256 * MEGABYTE):
        assert sum(1 for _ in load_beams(path, cache_dir=tmp_path / "cache", streaming=True)) == 48
