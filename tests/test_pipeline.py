"""From files to a report, in all the ways that the recipes can be run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import assert_same_weights, make_args, weights_of
from transformers import AutoModel

from lever_grpo import PointerSelector, SelectorSFTConfig
from lever_grpo.data import EmbeddingStore
from lever_grpo.inference import choose
from lever_grpo.pipeline import RecipeArguments, load_task, run, similarity_baseline
from lever_grpo.pipeline.task_data import make_collator
from lever_grpo.report import load_results


def make_recipe(files: dict[str, str], **options) -> RecipeArguments:
    own = {"beam_data": [files["train"]], "validation_data": files["validation"], "heldout_data": files["heldout"]}
    small = {
        "hidden_dim": 8,
        "num_set_layers": 0,
        "prior_rank": 2,
        "dropout": 0.1,
        "sft_epochs": 1,
        "sft_num_beams": 2,
    }
    return RecipeArguments(**{**own, **small, "embeddings": files["embeddings"], **options})


def full_recipe(files: dict[str, str]) -> RecipeArguments:
    """All stages: the embedding of the text stands for that of an answer."""
    return make_recipe(files, agreement_steps=5, answer_feature="text")


def selector_bytes(output: Path) -> dict[str, bytes]:
    names = ("sft", "agreement", "rce", "grpo")
    return {name: (output / name / "model.safetensors").read_bytes() for name in names}


@pytest.fixture(scope="module")
def finished(planted_files, tmp_path_factory):
    """An undisturbed run: its folder and its report."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, run(full_recipe(planted_files), make_args(output, learning_rate=0.02, seed=3))


# ---- the whole way ----


def test_report(finished):
    output, report = finished
    assert report == json.loads((output / "report.json").read_text())
    trained = ["sft", "agreement", "rce", "grpo"]
    assert list(report["methods"]) == ["zero_shot", "random", "similarity", *trained, "oracle"]
    for method in report["methods"].values():
        assert method["reward"]["ci_low"] <= method["reward"]["mean"] <= method["reward"]["ci_high"]
        assert "gap_closed" in method
    for name in ("grpo_minus_sft", "grpo_minus_similarity", "grpo_minus_random"):
        assert report["paired"][name].keys() >= {"mean", "ci_low", "ci_high"}
    assert "changed_vs_sft" in report["methods"]["grpo"]
    assert (output / "report.md").read_text().startswith("# ")
    assert {path.name for path in output.glob("*.png")} == {"curves.png", "gains.png"}


def test_rewards_of_the_report_are_those_of_the_saved_selectors(finished, planted_files):
    output, report = finished
    data = load_task(make_recipe(planted_files))
    for name in ("sft", "rce", "grpo"):
        model = AutoModel.from_pretrained(output / name)
        assert isinstance(model, PointerSelector)
        picks = choose(model, data.heldout, data.collator)
        rewards = [
            row["scores"][row["sequences"].index(pick)] for row, pick in zip(data.heldout, picks.tolist(), strict=True)
        ]
        assert report["methods"][name]["reward"]["mean"] == pytest.approx(np.mean(rewards))
        assert load_results(output / "results.json")[name].picks.tolist() == [picks.tolist()]
        assert torch.equal(
            torch.tensor(choose(AutoModel.from_pretrained(output / name), data.heldout, data.collator)),
            torch.tensor(picks),
        )


def test_an_earlier_run_is_not_mixed_with(finished, planted_files):
    output, _ = finished
    before = selector_bytes(output)
    with pytest.raises(ValueError, match="holds an earlier run .checkpoints, sft, agreement, rce, grpo."):
        run(make_recipe(planted_files), make_args(output))
    assert selector_bytes(output) == before


def test_a_finished_run_is_only_reported_again(finished, planted_files):
    output, report = finished
    again = run(
        full_recipe(planted_files), make_args(output, learning_rate=0.02, seed=3, resume_from_checkpoint="true")
    )
    assert again == report


def test_overwriting(planted_files, tmp_path):
    for stale in ("agreement", "rce", "grpo"):
        (tmp_path / "out" / stale).mkdir(parents=True)
        (tmp_path / "out" / stale / "config.json").write_text("{")
    report = run(make_recipe(planted_files, overwrite=True), make_args(tmp_path / "out", grpo_epochs=0))
    assert "rce" in report["methods"] and not {"grpo", "agreement"} & report["methods"].keys()


# ---- stages alone ----


def test_agreement_is_kept_where_validation_gains(finished, planted_files):
    """RCE starts from the better of the two; both are on disk."""
    output, _ = finished
    start = weights_of(PointerSelector.from_pretrained(output / "checkpoints" / "grpo" / "checkpoint-0"))
    data = load_task(full_recipe(planted_files))
    sft, agreement = (PointerSelector.from_pretrained(output / name) for name in ("sft", "agreement"))
    value = {}
    for name, policy in (("sft", sft), ("agreement", agreement)):
        picks = choose(policy, data.validation, data.collator).tolist()
        value[name] = np.mean(
            [row["scores"][row["sequences"].index(pick)] for row, pick in zip(data.validation, picks, strict=True)]
        )
    assert_same_weights(start, weights_of(agreement if value["agreement"] > value["sft"] else sft))
    changed = [name for name, x in weights_of(sft).items() if not torch.equal(x, weights_of(agreement)[name])]
    assert changed and all(name.startswith("prior.") for name in changed)


def test_rce_alone_then_grpo_from_it(finished, planted_files, tmp_path):
    output, _ = finished
    recipe = make_recipe(planted_files, sft_ckpt=str(output / "sft"))
    report = run(recipe, make_args(tmp_path / "rce", grpo_epochs=0))
    assert "grpo" not in report["methods"] and not (tmp_path / "rce" / "sft").exists()
    warm = weights_of(PointerSelector.from_pretrained(tmp_path / "rce" / "rce"))

    args = make_args(tmp_path / "grpo", rce_epochs=0, grpo_epochs=1)
    report = run(replace(recipe, sft_ckpt=str(tmp_path / "rce" / "rce")), args)
    assert "rce" not in report["methods"] and "grpo" in report["methods"]
    start = weights_of(PointerSelector.from_pretrained(tmp_path / "grpo" / "checkpoints" / "grpo" / "checkpoint-0"))
    assert_same_weights(start, warm)


def test_supervised_stage_alone(planted_files, tmp_path):
    args = SelectorSFTConfig(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        use_cpu=True,
        report_to="none",
        dataloader_pin_memory=False,
    )
    report = run(make_recipe(planted_files), args)
    assert list(report["methods"]) == ["zero_shot", "random", "similarity", "sft", "oracle"]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "out" / "sft"), PointerSelector)


# ---- data of one's own ----


def test_without_held_out_files_queries_are_set_aside(planted_files):
    data = load_task(make_recipe(planted_files, validation_data=None, heldout_data=None), seed=1)
    queries = [set(part["query_id"]) for part in (data.train, data.validation, data.heldout)]
    assert sum(map(len, queries)) == len(set().union(*queries)) == 24
    assert [len(q) for q in queries] == [15, 4, 5]
    # completed from the singles: every pair, the scored ones as they were
    assert {len(row["scores"]) for row in data.validation} == {20}
    assert {len(s) for row in data.train for s in row["sequences"]} == {2}
    assert len(data.notes) == 2 and all("estimated" in note for note in data.notes)


def test_lever_lm_files_are_judged_by_the_expected_reward(planted_files, tmp_path):
    """No singles: nothing can be estimated, so neither the best checkpoint nor the report looks at the greedy pick."""
    recipe = make_recipe(
        planted_files, beam_data=[planted_files["lever_lm"]], candidate_pools=planted_files["pools"],
        validation_data=None, heldout_data=None,
    )  # fmt: skip
    report = run(recipe, make_args(tmp_path / "out", grpo_epochs=1))
    assert report["methods"].keys() == {"random", "similarity", "sft", "rce", "grpo", "oracle"}
    state = json.loads((tmp_path / "out" / "checkpoints" / "grpo" / "trainer_state.json").read_text())
    rewards = [log["eval_expected_reward"] for log in state["log_history"] if "eval_loss" in log]
    assert state["best_metric"] == max(rewards)
    assert "expected reward" in (tmp_path / "out" / "report.md").read_text()


def test_judged_rows_and_entities_leave_the_training_pools(planted_files, tmp_path):
    recipe = make_recipe(planted_files, entities=planted_files["entities"], validation_data=None)
    data = load_task(recipe)
    judged = set(data.validation["query_id"]) | set(data.heldout["query_id"])
    for row in data.train:
        assert not judged & set(row["candidate_ids"])
        assert all(i // 2 != row["query_id"] // 2 for i in row["candidate_ids"])
    # the queries of one thing stand on one side
    assert not {i // 2 for i in data.train["query_id"]} & {i // 2 for i in data.validation["query_id"]}


def test_folds_hold_every_query_once(planted_files):
    recipe = make_recipe(planted_files, entities=planted_files["entities"], heldout_size=0.25)
    folds = [load_task(replace(recipe, heldout_fold=fold)) for fold in range(4)]
    queries = [set(data.heldout["query_id"]) for data in folds]
    assert sum(map(len, queries)) == len(set().union(*queries)) == 24
    for data, judged in zip(folds, queries, strict=True):
        assert not judged & set(data.train["query_id"])
        unseen = judged | {i ^ 1 for i in judged}  # two rows a thing
        for row in [*data.train, *data.heldout]:
            assert not unseen & set(row["candidate_ids"])
    with pytest.raises(ValueError, match="fold=4: must be at least 0, and below 1 / test_size"):
        load_task(replace(recipe, heldout_fold=4))


def test_fewer_queries(planted_files):
    data = load_task(make_recipe(planted_files, max_samples=7), seed=2)
    assert len(data.train) == 7 and len(data.validation) == 4
    other = load_task(make_recipe(planted_files, max_samples=7), seed=3)
    assert set(data.train["query_id"]) != set(other.train["query_id"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"embeddings": None}, "beam_data is given without embeddings"),
        ({"num_shots": 4}, "expected at least one group with shots=4"),
        ({"query_features": ["texts"]}, "texts"),
        ({"agreement_steps": 2}, "the store has no feature 'answer'"),
        ({"agreement_steps": 2, "similarity_prior": False, "sft_epochs": 0.1}, "this selector has none"),
        ({"model_preset": "v9"}, "preset='v9' is unknown"),
    ],
)
def test_mistakes_are_named(planted_files, tmp_path, options, message):
    with pytest.raises(Exception, match=message):
        run(make_recipe(planted_files, **options), make_args(tmp_path / "out"))


def test_similarity_features(planted_files, planted):
    data = load_task(make_recipe(planted_files))
    assert list(data.similarity_features) == ["text"]  # all that the two sides share
    with pytest.raises(ValueError, match="similarity_features=.'sound'.: the two sides share"):
        load_task(make_recipe(planted_files, similarity_features=["sound"]))
    for task, features in {"emoji": ("question",), "easy_vqa": ("question", "image")}.items():
        sample = load_task(RecipeArguments(task=task))
        assert sample.similarity_features == features
        nearest = choose(similarity_baseline(sample.collator, features), sample.heldout, sample.collator)
        assert (nearest == [0, 1]).all(1).mean() > 0.9  # the search ranked its pools by them


def test_a_query_is_not_shown_with_its_own_answer_by_default():
    answers = np.ones((3, 2), np.float32)
    store = EmbeddingStore({"question": answers, "answer": answers, "question_answer": answers})
    collator, similarity = make_collator(RecipeArguments(), store, None)
    assert (collator.query_features, similarity) == (("question",), ("question",))
    assert collator.candidate_features == tuple(store.names)
    named = RecipeArguments(query_features=["answer"])
    assert make_collator(named, store, None)[0].query_features == ("answer",)
    with pytest.raises(ValueError, match=r"those of answers alone \(answer\)"):
        make_collator(RecipeArguments(), EmbeddingStore({"answer": answers}), None)


# ---- dry run ----


def tree(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "options, steps", [({}, (2, 2, 2)), ({"grpo_epochs": 0}, (2, 0, 0)), ({"rce_epochs": 0}, (0, 2, 2))]
)
def test_dry_run_writes_nothing(planted_files, tmp_path, monkeypatch, caplog, options, steps):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert run(make_recipe(planted_files, dry_run=True), make_args("out", **options)) is None
    assert tree(tmp_path) == before
    assert f"steps of RCE, early and late GRPO: {steps}" in caplog.text


@pytest.mark.parametrize("reason", ["unknown", "not installed"])
def test_dry_run_finds_trackers_that_are_not_there(planted_files, tmp_path, monkeypatch, reason):
    args = make_args(tmp_path, report_to="tensorboard")
    if reason == "unknown":
        args.report_to = ["foo"]
    else:
        monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ValueError, match=r"foo is not supported|report_to=\['tensorboard'\]"):
        run(make_recipe(planted_files, dry_run=True), args)


def test_dry_run_finds_mistakes(planted_files, tmp_path):
    with pytest.raises(ValueError, match="needs the column 'absent'"):
        run(make_recipe(planted_files, dry_run=True), make_args(tmp_path, reward="absent"))
