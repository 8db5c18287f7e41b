"""Picks on validation queries that no log holds, scored by the model that made the log."""

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import TRAIN, VALIDATION, PlantedScorer, assert_same_weights, make_args, planted_task, score_of

from lever_grpo.data import load_beams
from lever_grpo.inference import choose
from lever_grpo.models import load_selector
from lever_grpo.pipeline import RecipeArguments, load_task, pick_scorer, run
from lever_grpo.pipeline.generate import GenerateArguments, generate
from lever_grpo.pipeline.pick_scorer import PickScorer
from lever_grpo.trainer import SelectorTrainer


SHOTS = 3
QUERIES = {"train": range(TRAIN), "validation": range(TRAIN, TRAIN + VALIDATION)}


class Counting(PlantedScorer):
    """Remembers what it was asked, and cannot be asked about some query."""

    def __init__(self, embeddings, mute=None):
        super().__init__(embeddings)
        self.asked, self.mute = [], mute

    def score(self, prompts):
        self.asked += [(p.query.id, tuple(row.id for row in p.demonstrations)) for p in prompts]
        scores = super().score(prompts)
        return [None if p.query.id == self.mute else s for p, s in zip(prompts, scores, strict=True)]


@pytest.fixture(scope="module")
def logs(planted, tmp_path_factory):
    """Logs of three demonstrations that hold a few of the 60 sequences of a pool."""
    folder = tmp_path_factory.mktemp("logs")
    task = planted_task(folder, planted)

    def make(split, score):
        arguments = GenerateArguments(
            **task, query_ids=list(QUERIES[split]), num_shots=SHOTS, beam_size=1, random_sequences=6,
            score=score, output_dir=str(folder / f"{split}-{score}"),
        )  # fmt: skip
        return generate(arguments, PlantedScorer(planted.embeddings))

    scores = {"train": ["log_prob"], "validation": ["log_prob", "infoscore", "logprob_gain"]}
    return folder, {(split, score): make(split, score) for split in scores for score in scores[split]}


def pools_of(log):
    groups = load_beams(log, shots=SHOTS)
    return dict(zip(groups["query_id"], groups["candidate_ids"], strict=True))


@pytest.mark.parametrize("score", ["log_prob", "infoscore", "logprob_gain"])
def test_scores_are_those_of_the_log(logs, planted, score):
    log = logs[1]["validation", score]
    scorer = PickScorer(log, pools_of(log), PlantedScorer(planted.embeddings))
    for row in load_beams(log, shots=SHOTS):
        found = scorer([row["query_id"]] * len(row["sequences"]), row["sequences"])
        np.testing.assert_allclose(found, row["scores"], atol=1e-12)


def test_each_sequence_is_asked_about_once_also_by_a_run_that_goes_on(logs, planted, tmp_path):
    log = logs[1]["validation", "logprob_gain"]
    pools, queries, picks = pools_of(log), [TRAIN, TRAIN + 1, TRAIN], [[4, 0, 1], [2, 3, 4], [4, 0, 1]]
    model = Counting(planted.embeddings, mute=TRAIN + 1)
    scorer = PickScorer(log, pools, model)
    scorer.keep_in(tmp_path)
    first = scorer(queries, picks)
    assert first[0] == first[2] and math.isnan(first[1])
    assert len(model.asked) == len(set(model.asked)) == 4  # two picks, and zero-shot of both queries
    # left construction: what was picked first stands next to the query
    assert (TRAIN, tuple(pools[TRAIN][i] for i in (1, 0, 4))) in model.asked
    np.testing.assert_array_equal(scorer(queries, picks), first)
    assert len(model.asked) == 4

    silent = Counting(planted.embeddings)
    again = PickScorer(log, pools, silent)
    again.keep_in(tmp_path)
    np.testing.assert_array_equal(again(queries, picks), first)
    assert silent.asked == []


def test_no_file_of_scores_is_overwritten_where_another_was_deleted(logs, planted, tmp_path):
    log = logs[1]["validation", "log_prob"]
    picks = [[4, 0, 1], [2, 3, 4], [1, 2, 0]]
    scorer = PickScorer(log, pools_of(log), PlantedScorer(planted.embeddings))
    scorer.keep_in(tmp_path)
    scorer([TRAIN], picks[:1]), scorer([TRAIN], picks[1:2])
    (tmp_path / "0-00000.jsonl").unlink()
    scorer([TRAIN], picks[2:])
    silent = Counting(planted.embeddings)
    again = PickScorer(log, pools_of(log), silent)
    again.keep_in(tmp_path)
    again([TRAIN, TRAIN], picks[1:])
    assert silent.asked == []


def recipe_of(logs, **options):
    folder, made = logs
    return RecipeArguments(
        beam_data=[str(made["train", "log_prob"])], validation_data=str(made["validation", "log_prob"]),
        heldout_data=str(made["validation", "log_prob"]), embeddings=str(folder / "text.npy"), num_shots=SHOTS,
        hidden_dim=8, prior_rank=2, dropout=0.1, sft_epochs=1, sft_num_beams=2, **options,
    )  # fmt: skip


def test_checkpoints_are_chosen_by_what_they_pick(logs, planted, tmp_path, monkeypatch):
    """By the exact reward of each checkpoint's picks, of which the log holds a few."""
    monkeypatch.setattr(pick_scorer, "make_scorer", lambda *_: PlantedScorer(planted.embeddings))
    recipe, output = recipe_of(logs, score_picks=True), tmp_path / "out"
    run(recipe, make_args(output, learning_rate=0.02, save_total_limit=None))
    state = json.loads((output / "checkpoints" / "grpo" / "trainer_state.json").read_text())
    logged = {log["step"]: log["eval_greedy_reward"] for log in state["log_history"] if "eval_loss" in log}
    data = load_task(recipe)
    assert len(logged) == 4
    for step, reward in logged.items():
        policy = load_selector(output / "checkpoints" / "grpo" / f"checkpoint-{step}")
        picks = choose(policy, data.validation, data.collator, SHOTS).tolist()
        exact = [
            score_of(planted.embeddings, [row["candidate_ids"][i] for i in pick])
            for row, pick in zip(data.validation, picks, strict=True)
        ]
        assert reward == pytest.approx(np.mean(exact), abs=1e-6)
        held = [pick in row["sequences"] for row, pick in zip(data.validation, picks, strict=True)]
        assert not all(held)  # else nothing was asked
    assert state["best_metric"] == max(logged.values())
    assert list((output / "checkpoints" / "picks").glob("0-*.jsonl"))


def test_sources_of_what_is_learned_from(logs):
    every, drawn = (load_task(recipe_of(logs, sources=sources)) for sources in (None, ["random"]))
    assert {source for row in every.train["source"] for source in row} == {"search", "random"}
    assert {source for row in drawn.train["source"] for source in row} == {"random"}
    assert drawn.validation.to_list() == every.validation.to_list()  # what is judged on stays whole


def test_without_it_the_expected_reward_decides(logs, tmp_path):
    output = tmp_path / "out"
    run(recipe_of(logs), make_args(output, grpo_epochs=1))
    state = json.loads((output / "checkpoints" / "grpo" / "trainer_state.json").read_text())
    evaluations = [log for log in state["log_history"] if "eval_loss" in log]
    assert state["best_metric"] == max(log["eval_expected_reward"] for log in evaluations)


def test_another_model_is_refused(logs, planted, tmp_path):
    class Other(PlantedScorer):
        def describe(self):
            return {"backend": "other"}

    log = logs[1]["validation", "log_prob"]
    with pytest.raises(ValueError, match="backend: 'planted' there, 'other' here"):
        PickScorer(log, pools_of(log), Other(planted.embeddings))([TRAIN], [[0, 1, 2]])
    PickScorer(log, pools_of(log)).keep_in(tmp_path)
    (tmp_path / "scorer.json").write_text('{"backend": "other"}')
    with pytest.raises(ValueError, match="does not agree with scorer.json"):
        PickScorer(log, pools_of(log)).keep_in(tmp_path)


def test_other_rows_are_refused(logs, planted, tmp_path):
    about = json.loads((logs[1]["validation", "log_prob"].parent / "manifest.json").read_text())
    rows = tmp_path / "rows.jsonl"
    rows.write_text(Path(about["arguments"]["task_file"]).read_text().replace("thing 7?", "thing 8?"))
    log = tmp_path / "beams.jsonl"
    log.write_bytes(logs[1]["validation", "log_prob"].read_bytes())
    about["arguments"]["task_file"] = str(rows)
    (tmp_path / "manifest.json").write_text(json.dumps(about))
    scorer = PickScorer(log, pools_of(log), PlantedScorer(planted.embeddings))
    with pytest.raises(ValueError, match="what is to score picks is not what made the log .rows_sha256"):
        scorer([TRAIN], [[0, 1, 2]])
    rows.unlink()
    with pytest.raises(ValueError, match="manifest.json names rows that cannot be read"):
        PickScorer(log, pools_of(log))


def test_one_log_of_its_own_is_needed(logs, tmp_path):
    with pytest.raises(ValueError, match="score_picks is set without validation_data"):
        recipe = recipe_of(logs, score_picks=True)
        recipe.validation_data = None
        load_task(recipe)
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(logs[1]["validation", "log_prob"].read_bytes())
    with pytest.raises(ValueError, match="is 2 files"):
        PickScorer(tmp_path, {})


def test_shorter_picks_of_a_policy_that_stops(logs, planted):
    """-1 behind the end of a pick is no position."""
    log = logs[1]["validation", "log_prob"]
    model = Counting(planted.embeddings)
    trainer = SimpleNamespace(score_picks=PickScorer(log, pools_of(log), model))
    asked = torch.tensor([True, False, True])
    picks = torch.tensor([[4, -1, -1], [0, 1, 2], [2, 3, -1]])
    scores = SelectorTrainer._scores_of(trainer, torch.tensor([TRAIN, TRAIN + 1, TRAIN + 2]), picks, asked)
    pools = pools_of(log)
    shown = [[pools[TRAIN][4]], [pools[TRAIN + 2][3], pools[TRAIN + 2][2]]]  # in the prompt's order
    assert [list(demonstrations) for _, demonstrations in model.asked] == shown
    expected = [score_of(planted.embeddings, ids[::-1]) for ids in shown]
    assert scores[asked].tolist() == pytest.approx(expected) and scores[1].isnan()


def test_a_run_that_goes_on_ends_with_the_same_weights(logs, planted, tmp_path, monkeypatch):
    """Though the model is then loaded at another moment, and loading draws random numbers."""

    def load(*_):
        torch.rand(7)
        return PlantedScorer(planted.embeddings)

    monkeypatch.setattr(pick_scorer, "make_scorer", load)
    recipe, whole, cut = recipe_of(logs, score_picks=True), tmp_path / "whole", tmp_path / "cut"
    run(recipe, make_args(whole, learning_rate=0.02, save_total_limit=None))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "grpo")
    for step in (6, 9):
        shutil.rmtree(cut / "checkpoints" / "grpo" / f"checkpoint-{step}")
    known = sorted((cut / "checkpoints" / "picks").glob("*.jsonl"))
    for path in known[len(known) // 2 :]:
        path.unlink()
    run(recipe, make_args(cut, learning_rate=0.02, save_total_limit=None, resume_from_checkpoint="true"))
    weights = [load_selector(folder / "grpo").state_dict() for folder in (whole, cut)]
    assert_same_weights(*weights)


@pytest.mark.parametrize(
    "manifest, message",
    [
        (None, "score_picks needs .*manifest.json, which says how the validation log was made"),
        ("{", "manifest.json: expected the manifest of a log"),
        ("[]", "manifest.json: expected the manifest of a log"),
        ('{"scorer": {}}', "'arguments'"),
        ('{"arguments": {"num_shots": 99}, "scorer": {}}', "num_shots=99 must lie in"),
        ('{"arguments": {"new_option": 1}, "scorer": {}}', "the argument 'new_option' is unknown here"),
        ('{"arguments": {}, "scorer": {}}', "'inputs'"),
    ],
)
def test_a_log_that_does_not_say_how_it_was_made(logs, tmp_path, manifest, message):
    log = tmp_path / "beams.jsonl"
    log.write_bytes(logs[1]["validation", "log_prob"].read_bytes())
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    recipe = recipe_of(logs, score_picks=True)
    recipe.validation_data = str(log)
    with pytest.raises(ValueError, match=message):
        load_task(recipe)


def test_other_rewards_than_the_score_are_refused(logs, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(pick_scorer, "make_scorer", lambda *_: PlantedScorer(planted.embeddings))
    others = (
        {"reward": "log_prob"},
        {"reward_weights": {"beam": 1.0, "diversity": 0.1}},
        {"multi_objective_aggregation": "normalize_then_sum"},
    )
    for number, options in enumerate(others):
        with pytest.raises(ValueError, match="score_picks gives the score of a log, and the reward is another one"):
            run(recipe_of(logs, score_picks=True), make_args(tmp_path / str(number), **options))
