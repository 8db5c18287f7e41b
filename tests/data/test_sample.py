"""The packaged sample is what its card says."""

import json

import numpy as np
import pytest

from lever_grpo.data import SampleTask, inspect_log, list_samples, load_beams, load_sample
from lever_grpo.data.sample import SAMPLE_FOLDER
from lever_grpo.search.features import load_encoders


BEAMS = {"supersense": 3, "easy_vqa": 1}
HELDOUT = {  # similarity, mean of all pairs, best pair
    "supersense": (-2.1730302, -2.4596839, -0.1065577),
    "emoji": (-1.4137235, -2.871493, -0.356111),
    "country_facts": (-1.2454852, -1.68993, -0.812012),
    "easy_vqa": (-0.4229477, -0.440592, -0.0621107),
}


@pytest.fixture(scope="module", params=list(HELDOUT))
def task(request) -> SampleTask:
    return load_sample(request.param)


def test_reference_values_on_heldout_queries(task, tmp_path):
    similarity, random, oracle = HELDOUT[task.name]
    groups = task.load("heldout", shots=2, cache_dir=tmp_path)
    picks = [
        row["scores"][row["sequences"].index([0, 1])] for row in groups
    ]  # the first two of the pool, nearest first
    assert np.mean(picks) == pytest.approx(similarity, abs=1e-6)
    assert np.mean([np.mean(row["scores"]) for row in groups]) == pytest.approx(random, abs=1e-6)
    assert np.mean([max(row["scores"]) for row in groups]) == pytest.approx(oracle, abs=1e-6)
    assert {len(row["scores"]) for row in groups} == {240} and {len(row["candidate_ids"]) for row in groups} == {16}


def test_heldout_queries_are_nowhere_else(task, tmp_path):
    splits = {split: task.load(split, cache_dir=tmp_path) for split in task.splits}
    queries = {split: set(groups["query_id"]) for split, groups in splits.items()}
    for groups in splits.values():
        assert not queries["heldout"] & {i for pool in groups["candidate_ids"] for i in pool}
    assert sum(map(len, queries.values())) == len(set().union(*queries.values()))  # no query is in two splits
    train = splits["train"]
    beams = BEAMS.get(task.name, 5)
    searched = 16 + 15 * beams
    assert sum(train[0]["survived"]) == beams
    if task.name in BEAMS:  # random pairs that the search had scored already are there once
        assert {len(row["scores"]) - searched for row in train} <= set(range(10, 25))
    else:
        assert len(train[0]["scores"]) == searched


def test_it_is_said_how_embeddings_are_made_of_rows(task):
    encoders, maps = load_encoders(task.folder)
    if task.name == "emoji":  # its pictures are no part of a row
        assert not encoders
        return
    assert encoders.keys() == set(task.store.names)
    assert maps.keys() == {name for name, encoder in encoders.items() if encoder.kind != "text"}
    assert all(len(fitted.directions) == task.store.widths[name] for name, fitted in maps.items())
    assert not any(encoders[name].of_answer for name in task.query_features)


def test_embeddings_and_rows_belong_to_the_log(task, tmp_path):
    store, rows = task.store, task.rows()
    assert len(rows) == len(store) and [row["id"] for row in rows] == list(range(len(rows)))
    for name in store.names:
        norms = np.linalg.norm(store[name].astype(np.float32), axis=1)
        np.testing.assert_allclose(norms, 1, atol=2e-3)
    store.check_finite()
    heldout = task.load("heldout", cache_dir=tmp_path)
    # nearest first: the pool's first candidate is closer to the query than the last, on average by far
    side = task.query_features[:1], task.candidate_features[:1]
    query = store.gather(heldout["query_id"][:], side[0])
    near, far = (store.gather([pool[p] for pool in heldout["candidate_ids"]], side[1]) for p in (0, -1))
    assert (query * near).sum(1).mean() > (query * far).sum(1).mean() + 0.1
    report = inspect_log(heldout, store=store)
    assert not report.warnings


def test_lever_lm_example_agrees_with_the_log(tmp_path):
    task = load_sample("country_facts")
    beams = load_beams(task.folder / "beams_train.json", candidate_pools=task.train, cache_dir=tmp_path)
    train = {row["query_id"]: row for row in task.load("train", cache_dir=tmp_path)}
    assert len(beams) == len(train)
    for row in beams:
        full = train[row["query_id"]]
        assert row["candidate_ids"] == full["candidate_ids"]
        score_of = dict(
            zip(map(tuple, full["sequences"]), zip(full["scores"], full["survived"], strict=True), strict=True)
        )
        for sequence, gain in zip(row["sequences"], row["scores"], strict=True):
            score, survived = score_of[tuple(sequence)]
            assert survived and score - full["zero_shot"] == pytest.approx(gain, abs=2e-5)


def test_sample_is_small_and_described():
    assert sum(path.stat().st_size for path in SAMPLE_FOLDER.rglob("*") if path.is_file()) < 32_000_000
    card = (SAMPLE_FOLDER / "README.md").read_text()
    for name in list_samples():
        assert f"`{name}`" in card
        for _, value in zip(range(3), HELDOUT[name], strict=True):
            assert f"{value:.4f}" in card
    json.loads((SAMPLE_FOLDER / "country_facts" / "beams_train.json").read_text())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="emoji.*'mnist'"):
        load_sample("mnist")
    with pytest.raises(ValueError, match="heldout.*'test'"):
        load_sample("easy_vqa").load("test")
    assert load_sample("country_facts").validation is None and load_sample("emoji").validation.exists()
