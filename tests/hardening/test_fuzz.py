"""Valid files with a few changes at random: they are read, or refused by an error that names the file."""

import gzip
import json
import struct
import tempfile
from pathlib import Path

import numpy as np
from corpus import F32, group, lever_lm, lines, more_memory_than, npy, pointer, row, scored, tensors, text
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lever_grpo.convert import read_checkpoint
from lever_grpo.data import EmbeddingStore, load_beams, load_examples
from lever_grpo.data.pools import PoolSource, read_external_ids
from lever_grpo.pipeline.parsing import read_config


MEMORY = 1 << 30
PIECES = (
    *(b'"', b"'", b"\\", b"[", b"]", b"{", b"}", b",", b":", b"\n", b"\r\n", b"\0", b"\xff", b"\xef\xbb\xbf", b" "),
    *(
        b"NaN",
        b"Infinity",
        b"1e999",
        b"-1",
        b"null",
        b"true",
        b'""',
        b"[]",
        b"{}",
        b'"\\ud800"',
        b"&a ",
        b"*a",
        b"!!str",
    ),
    *(b"2147483648", b"9223372036854775808", b"1" * 400, b"1" * 5000, b"[" * 2000, b'{"a":' * 2000),
)
LOGS = {
    "lever_lm.json": text({"_meta": {"a": 1}, "7": lever_lm(shot_scores=[[0.2, 0.1], [0.2, 0.4]]), "8": lever_lm(8)}),
    "beams.json": text({"7": {"beams": [{"shots": [{"id": 10, "score": 0.5}]}], "candidate_ids": [10, 11]}}),
    "pointer.json": text({"7": pointer(), "8": pointer()}),
    "scored.jsonl": lines(scored(), scored({"search_order": [10], "score": 1.0, "correct": True}, query_id=8)),
    "group.jsonl": lines(group(columns={"correct": [1.0, None]}, notes={"repeats": 1}, shot_scores=[[], [0.5]])),
    "array.json": text([scored(), scored(query_id=8)]),
}


@st.composite
def changed(draw, contents):
    """One of the files, by its name, with one to four changes."""
    name = draw(st.sampled_from(sorted(contents)))
    content = contents[name].encode() if isinstance(contents[name], str) else contents[name]
    for _ in range(draw(st.integers(1, 4))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 12))
        piece = draw(st.one_of(st.just(b""), st.sampled_from(PIECES), st.binary(max_size=4)))
        content = content[:at] + piece + content[at + length :]
    return name, draw(st.sampled_from([content] * 4 + [content[: len(content) // 2]]))


def check(read, name, content):
    with tempfile.TemporaryDirectory() as folder, more_memory_than(MEMORY):
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            read(path)
        except (ValueError, OSError) as error:
            assert name in str(error)
        assert {file.name for file in Path(folder).iterdir()} - {"cache"} == {name}


# the same examples in every run, and none from another one; what fails is small as it is
fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@fuzz
@given(changed(LOGS))
def test_logs(file):
    check(lambda path: list(load_beams(path, cache_dir=path.parent / "cache", streaming=True)), *file)


@fuzz
@given(
    changed(
        {"task.jsonl": lines(row(), row(id=1, answers=["a", "b"], entity="x")), "strings.jsonl": lines(row(id="a"))}
    )
)
def test_tasks(file):
    check(load_examples, *file)


@fuzz
@given(changed({"task.jsonl.gz": gzip.compress(lines(row(), row(id=1)).encode(), mtime=0)}))
def test_gzip(file):
    check(load_examples, *file)


@fuzz
@given(
    changed(
        {"config.yaml": "task: emoji\nseed: 1\nquery_features: [question, hidden]\nmodel_init_kwargs: {stop: true}\n"}
    )
)
def test_configs(file):
    check(read_config, *file)


@fuzz
@given(changed({"ids.json": text({"1": "a", "2": 5})}))
def test_external_ids(file):
    check(read_external_ids, *file)


@fuzz
@given(changed({"e.safetensors": tensors({"a": F32, "b": {**F32, "data_offsets": [16, 32]}}, bytes(32))}))
def test_safetensors(file):
    check(EmbeddingStore.open, *file)
    check(read_checkpoint, *file)


@fuzz
@given(changed({"e.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}")}))
def test_npy(file):
    check(EmbeddingStore.open, *file)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, max_size=3), st.integers(0, 2**64 - 1)
)
def test_headers_of_any_json(entry, length):
    header = json.dumps({"a": {**F32, **entry}}).encode()
    check(EmbeddingStore.open, "e.safetensors", tensors(header))
    check(EmbeddingStore.open, "e.safetensors", struct.pack("<Q", length) + header)


@fuzz
@given(st.dictionaries(st.sampled_from(["id", "question", "answer", "answers", "image", "entity"]), JSON))
def test_rows_of_any_json(record):
    check(load_examples, "task.jsonl", lines({**row(), **record}).encode("utf-8", "surrogatepass"))


@fuzz
@given(JSON, st.sampled_from(["pool", "query_id", "candidate_ids"]))
def test_pools_of_any_json(value, name):
    record = {"query_id": 7, "pool": [1], name: value}
    check(lambda path: PoolSource(path)(7), "pools.jsonl", lines(record).encode("utf-8", "surrogatepass"))


LOG_FIELDS = sorted(
    set().union(*(scored(), group(), lever_lm(), pointer(), {"beams", "shot_scores", "notes", "columns"}))
)


@fuzz
@given(
    st.sampled_from([scored(), group(), {"query_id": 7, **lever_lm()}, {"query_id": 7, **pointer()}]),
    st.dictionaries(st.sampled_from(LOG_FIELDS), JSON, min_size=1, max_size=2),
)
def test_records_of_any_json(record, changes):
    content = lines({**record, **changes}).encode("utf-8", "surrogatepass")
    check(lambda path: list(load_beams(path, cache_dir=path.parent / "cache", streaming=True)), "log.jsonl", content)


def test_the_files_are_valid_before_they_are_changed(tmp_path):
    for name, content in LOGS.items():
        (tmp_path / name).write_text(content)
        assert len(load_beams(tmp_path / name, cache_dir=tmp_path / "cache"))
    (tmp_path / "e.npy").write_bytes(npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2)}"))
    assert np.array_equal(EmbeddingStore.open(tmp_path / "e.npy")["e"], np.zeros((2, 2)))
