"""What the builder does beyond reading records: cache, processes, streaming, file names."""

import json
import os
import pickle

import pytest

from lever_grpo.data import BeamDataError, BeamJson, load_beams


POOL = [10, 11, 12]


def write(path, query_id=7, scores=(0.5, 0.1)):
    record = {
        "id_list": [[10, query_id], [11, query_id]][: len(scores)],
        "score_list": list(scores),
        "candidate_ids": POOL,
    }
    path.write_text(json.dumps({str(query_id): record}))
    return path


@pytest.fixture
def load(tmp_path):
    return lambda paths, **options: load_beams(paths, cache_dir=tmp_path / "cache", **options)


def test_second_load_reads_the_cache_and_says_the_same(load, tmp_path, monkeypatch):
    path = write(tmp_path / "a.json")
    first = load(path)
    monkeypatch.setattr(BeamJson, "_generate_tables", lambda *a, **k: pytest.fail("read again"))
    assert str(load(path)[:]) == str(first[:])  # as text: NaN is not equal to itself


def test_edited_data_and_changed_options_are_noticed(load, tmp_path):
    path = write(tmp_path / "a.json", scores=(0.5, 0.1))
    assert load(path)[0]["scores"] == [0.5, 0.1]
    assert load(path, higher_is_better=False)[0]["scores"] == [-0.5, -0.1]
    stat = path.stat()
    write(path, scores=(0.6, 0.1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # even if its time and size say nothing
    assert load(path)[0]["scores"] == [0.6, 0.1]


def test_an_edited_side_file_is_noticed(load, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"7": {"id_list": [[10, 7]], "score_list": [0.5]}}))
    side = tmp_path / "pools.json"
    for pool in (POOL, POOL[::-1]):
        side.write_text(json.dumps({"7": pool}))
        assert load(path, candidate_pools=side)[0]["candidate_ids"] == pool
        builder = BeamJson(data_files=str(path), candidate_pools=str(side), cache_dir=str(tmp_path / "other"))
        builder.download_and_prepare()
        assert builder.as_dataset("train")[0]["candidate_ids"] == pool


def test_a_failed_load_leaves_no_cache_behind(load, tmp_path):
    good = [write(tmp_path / f"{q}.json", q) for q in range(100, 103)]
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"7": {"id_list": [[10, 8]], "score_list": [0.5], "candidate_ids": POOL}}))
    for _ in range(2):
        with pytest.raises(BeamDataError, match="record '7'"):
            load([*good, bad])
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    write(bad)
    assert len(load([*good, bad])) == 4


def test_processes_share_the_files(load, tmp_path):
    paths = [write(tmp_path / f"{q}.json", q) for q in range(100, 105)]
    assert load(paths, num_proc=2)["query_id"][:] == [100, 101, 102, 103, 104]
    paths[3].write_text('{"103": {"id_list": [[10, 8]], "score_list": [0.5]}}')
    with pytest.raises(BeamDataError, match="record '103'"):
        load(paths, num_proc=2)


def test_more_processes_than_files(load, tmp_path):
    assert len(load(write(tmp_path / "a.json"), num_proc=4)) == 1


def test_streaming_gives_the_same_rows_and_writes_nothing(load, tmp_path, caplog):
    paths = [write(tmp_path / f"{q}.json", q, scores=(0.5, 0.1)) for q in (7, 8)]
    stream = load_beams(paths, streaming=True, cache_dir=tmp_path / "stream")
    rows = list(stream)
    assert str(rows) == str(list(load(paths))) and stream.features == load(paths).features
    assert not list((tmp_path / "stream").rglob("*.arrow"))
    paths[0].write_text(json.dumps({"7": {"id_list": [[10, 7]], "score_list": [0.5]}}))
    list(load_beams(paths[0], streaming=True, rebuild_pools=True))
    assert "pools were rebuilt" in caplog.text


def test_odd_file_names_folders_patterns_and_splits(load, tmp_path):
    folder = tmp_path / "logs [1]"
    folder.mkdir()
    odd = write(folder / "vqa-a-b-c-scorer:x-construct_order:left [2] *.json")
    write(folder / "b.json", 8)
    assert load(odd)["query_id"][:] == [7]
    for beside in ("manifest.json", "failures.json", "encoders.json", ".settings.json"):
        (folder / beside).write_text("[]")
    assert sorted(load(folder)["query_id"]) == [7, 8]
    (tmp_path / "more").mkdir()
    write(tmp_path / "more" / "c.json", 9)
    assert load(str(tmp_path / "more" / "*.json"))["query_id"][:] == [9]
    parts = load({"train": odd, "validation": folder / "b.json"})
    assert parts["train"]["query_id"][:] == [7] and parts["validation"]["query_id"][:] == [8]
    with pytest.raises(FileNotFoundError, match="nothing.json"):
        load(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="empty list"):
        load([])


def test_a_large_file_is_read_as_a_stream(tmp_path):
    """Memory stays flat: the parser never sees the whole object at once."""
    import tracemalloc

    from lever_grpo.data.readers import iter_records

    record = json.dumps({"id_list": [[10, 11, 7]] * 50, "score_list": [0.5] * 50, "note": "x" * 2000})
    path = tmp_path / "big.json"
    path.write_text("{" + ",".join(f'"{i}": {record}' for i in range(3000)) + "}")
    size = path.stat().st_size
    tracemalloc.start()
    assert sum(1 for _ in iter_records(str(path))) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size / 5


def test_error_is_a_value_error_and_pickles():
    error = pickle.loads(pickle.dumps(BeamDataError("a: b")))
    assert isinstance(error, ValueError) and str(error) == "a: b"
