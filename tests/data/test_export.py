"""What an export writes is what the family's files hold, and what `load_beams` reads back."""

import json
import logging
import math
import tempfile
from itertools import permutations
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_grpo.data import BeamDataError, load_beams, load_sample, log_metadata, parse_log_name, to_prompt_order
from lever_grpo.data.export import export_lever_lm, export_lever_plus


ROW = {
    "query_id": 7,
    "candidate_ids": [10, 11, 12, 13],
    "sequences": [[0, 1], [0, 2], [3, 0], [1, 2]],
    "scores": [0.4, 0.7, 0.5, 0.1],
    "shot_scores": [[0.3, 0.1], [0.3, 0.4], [0.25, 0.25], [0.1, 0.0]],
    "survived": [True, True, True, False],
}
EXPORTS = [export_lever_lm, export_lever_plus]


def changed(**changes):
    return {**ROW, **changes}


def test_a_lever_lm_file_by_hand(tmp_path):
    path = export_lever_lm([ROW], tmp_path / "log.json")
    assert path == tmp_path / "log.json"
    assert json.loads(path.read_text()) == {
        "7": {
            # sorted by the cumulative score; the demonstration found last first, then the query
            "id_list": [[12, 10, 7], [10, 13, 7], [11, 10, 7]],
            "score_list": [0.4, 0.25, 0.1],
            "shot_scores": [[0.3, 0.4], [0.25, 0.25], [0.3, 0.1]],
        }
    }
    assert json.loads((tmp_path / "pools" / "log.json").read_text()) == {"7": [10, 11, 12, 13]}


def test_a_lever_plus_file_by_hand(tmp_path):
    (entry,) = json.loads(export_lever_plus([ROW], tmp_path / "log.json").read_text()).values()
    assert entry["few_shot_num"] == 2 and len(entry["beams"]) == 3
    assert entry["beams"][0] == {
        "shots": [{"id": 10, "score": 0.3}, {"id": 12, "score": 0.4}],
        "final_score": 0.4,
        "full_sequence": [12, 10, 7],
    }
    (plain,) = json.loads(export_lever_lm([ROW], tmp_path / "plain.json").read_text()).values()
    assert {name: entry[name] for name in plain} == plain


@pytest.mark.parametrize("order", ["left", "right"])
def test_the_files_ids_are_the_prompt_for_left_and_its_reverse_for_right(tmp_path, order):
    path = export_lever_lm([changed(survived=[True, False, False, False])], tmp_path, construct_order=order)
    ids = json.loads(path.read_text())["7"]["id_list"][0][:-1]
    prompt = to_prompt_order([10, 11], order)
    assert ids == (prompt if order == "left" else prompt[::-1])


def test_the_name_says_what_is_inside(tmp_path):
    parts = {"task": "vqa", "dataset_name": "okvqa", "model": "SmolLM2-135M", "sampler": "text_sim"}
    path = export_lever_lm([ROW, changed(query_id=8)], tmp_path / "new", construct_order="right", **parts)
    assert parse_log_name(path) == {
        "task": "vqa",
        "dataset": "okvqa",
        "model": "SmolLM2-135M",
        "sampler": "text_sim",
        "scorer": "infoscore",
        "construct_order": "right",
        "beam_size": 3,
        "few_shot": 2,
        "candidate_num": 4,
        "sample_num": 2,
    }
    pools = path.parent / "pools" / path.name
    # the folder itself can be loaded: the pools are not taken for a log
    groups = load_beams(path.parent, candidate_pools=pools, cache_dir=tmp_path / "cache")
    assert groups["query_id"][:] == [7, 8] and log_metadata(groups)[path.name]["construct_order"] == "right"


@pytest.mark.parametrize("part", [{"sampler": "text-sim"}, {"model": "org/model"}, {"task": ""}, {"scorer": "a-b"}])
def test_parts_that_the_name_cannot_hold_are_refused(tmp_path, part):
    with pytest.raises(ValueError, match="would not be read back"):
        export_lever_lm([ROW], tmp_path, **part)
    assert not list(tmp_path.iterdir())


@st.composite
def logs(draw):
    shots = draw(st.integers(1, 3))
    rows = []
    for query in draw(st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True)):
        pool = draw(st.lists(st.integers(31, 60), min_size=shots, max_size=6, unique=True))
        sequence = st.sampled_from(list(permutations(range(len(pool)), shots)))
        sequences = draw(st.lists(sequence, min_size=1, max_size=5, unique=True))
        gain = st.floats(-2, 2, allow_nan=False)
        gains = [draw(st.lists(gain, min_size=shots, max_size=shots)) for _ in sequences]
        survived = [True] + [draw(st.booleans()) for _ in sequences[1:]]
        rows.append(
            {
                "query_id": query,
                "candidate_ids": pool,
                "sequences": [list(s) for s in sequences],
                "scores": [math.fsum(of_shots) for of_shots in gains],
                "shot_scores": gains,
                "survived": survived,
            }
        )
    return rows


@pytest.mark.parametrize("export", EXPORTS)
@settings(max_examples=25, deadline=None)
@given(rows=logs(), order=st.sampled_from(["left", "right"]), as_dataset=st.booleans())
def test_round_trip(export, rows, order, as_dataset):
    with tempfile.TemporaryDirectory() as folder:
        log = Dataset.from_list(rows) if as_dataset else rows
        path = export(log, folder, construct_order=order)
        pools = path.parent / "pools" / path.name
        back = load_beams(path, candidate_pools=pools, construct_order=order, cache_dir=Path(folder, "cache"))
        assert len(back) == len(rows)
        for row, read in zip(rows, back, strict=True):
            assert read["query_id"] == row["query_id"] and read["candidate_ids"] == row["candidate_ids"]
            assert all(read["survived"]) and not read["notes"]["marginal"] and not read["notes"]["repeats"]
            kept = [i for i, survived in enumerate(row["survived"]) if survived]
            expected = {tuple(row["sequences"][i]): (row["scores"][i], row["shot_scores"][i]) for i in kept}
            found = zip(
                map(tuple, read["sequences"]), zip(read["scores"], read["shot_scores"], strict=True), strict=True
            )
            assert dict(found) == expected
            assert read["scores"] == sorted(read["scores"], reverse=True)


def test_a_log_without_gains_keeps_its_scores(tmp_path):
    log = load_sample("country_facts").load("train", cache_dir=tmp_path / "a").select(range(5))
    path = export_lever_lm(log, tmp_path / "log.json")
    pools = tmp_path / "pools" / "log.json"
    back = load_beams(path, candidate_pools=pools, cache_dir=tmp_path / "b")
    for row, read in zip(log, back, strict=True):
        assert read["notes"]["marginal"] and "shot_scores" not in json.loads(path.read_text())[str(row["query_id"])]
        kept = {tuple(s): v for s, v, on in zip(row["sequences"], row["scores"], row["survived"], strict=True) if on}
        assert dict(zip(map(tuple, read["sequences"]), read["scores"], strict=True)) == kept
    with pytest.raises(BeamDataError, match="query .*'shot_scores'.*use export_lever_lm"):
        export_lever_plus(log, tmp_path / "plus.json")


def test_queries_without_survivors_are_left_out_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        path = export_lever_lm([ROW, changed(query_id=8, survived=[False] * 4)], tmp_path / "log.json")
    assert list(json.loads(path.read_text())) == ["7"] and "1 of 2 queries have no survivor" in caplog.text


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "found no survivor in 0 queries"),
        ([changed(survived=[False] * 4)], "found no survivor in 1 queries"),
        ([ROW, ROW], "query 7, field 'query_id'.*one row a query"),
        ([changed(sequences=[[0], [0, 2], [3, 0], [1, 2]], shot_scores=None)], r"one length, found \[1, 2\].*shots="),
        ([changed(scores=[0.4, math.nan, 0.5, 0.1])], r"query 7, field 'scores\[1\]'.*finite numbers, found \[nan"),
        ([changed(shot_scores=[[0.3, math.inf]] * 4)], "query 7.*finite numbers"),
        ([changed(shot_scores=[[0.3]] * 4)], r"query 7, field 'shot_scores\[1\]'.*2 gains"),
    ],
)
def test_logs_that_cannot_be_exported(tmp_path, rows, message):
    with pytest.raises(BeamDataError, match=message):
        export_lever_lm(rows, tmp_path / "log.json")
    assert not list(tmp_path.iterdir())


def test_unknown_construct_order(tmp_path):
    with pytest.raises(ValueError, match="'left' or 'right', got 'up'"):
        export_lever_plus([ROW], tmp_path / "log.json", construct_order="up")
