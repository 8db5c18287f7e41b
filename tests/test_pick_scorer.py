"""Picks on validation queries that no log holds, scored by the model that made the log."""

import json
import math

import numpy as np
import pytest
from planted import TRAIN, VALIDATION, PlantedScorer, make_args, planted_task, score_of

from lever_grpo.data import load_beams
from lever_grpo.inference import choose
from lever_grpo.models import load_selector
from lever_grpo.pipeline import RecipeArguments, load_task, pick_scorer, run
from lever_grpo.pipeline.generate import GenerateArguments, generate
from lever_grpo.pipeline.pick_scorer import PickScorer


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


def test_without_it_the_expected_reward_decides(logs, tmp_path):
    output = tmp_path / "out"
    run(recipe_of(logs), make_args(output, grpo_epochs=1))
    state = json.loads((output / "checkpoints" / "grpo" / "trainer_state.json").read_text())
    evaluations = [log for log in state["log_history"] if "eval_loss" in log]
    assert state["best_metric"] == max(log["eval_expected_reward"] for log in evaluations)


def test_another_model_is_refused(logs, planted):
    class Other(PlantedScorer):
        def describe(self):
            return {"backend": "other"}

    log = logs[1]["validation", "log_prob"]
    with pytest.raises(ValueError, match="backend: 'planted' there, 'other' here"):
        PickScorer(log, pools_of(log), Other(planted.embeddings))([TRAIN], [[0, 1, 2]])


@pytest.mark.parametrize(
    "manifest, message",
    [
        (None, "score_picks needs .*manifest.json, which says how the validation log was made"),
        ("{", "manifest.json: expected the manifest of a log"),
        ("[]", "manifest.json: expected the manifest of a log"),
        ('{"scorer": {}}', "'arguments'"),
        ('{"arguments": {"num_shots": 99}, "scorer": {}}', "num_shots=99 must lie in"),
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
    for options in ({"reward": "log_prob"}, {"reward_weights": {"beam": 1.0, "diversity": 0.1}}):
        with pytest.raises(ValueError, match="score_picks gives the score of a log, and the reward is another one"):
            run(recipe_of(logs, score_picks=True), make_args(tmp_path / "out", **options))
