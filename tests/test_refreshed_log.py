"""A log is made, a selector learns from it, and what it then proposes goes, scored, into the next log."""

import numpy as np
import pytest
from planted import TRAIN, Planted, PlantedScorer, make_selector, make_trainer, planted_task
from transformers import PrinterCallback

from lever_grpo import SelectorSFTConfig, SelectorSFTTrainer
from lever_grpo.data import load_beams
from lever_grpo.models import load_selector
from lever_grpo.pipeline.generate import GenerateArguments, generate


def greedy_reward(folder, planted, model):
    """Of the greedy picks, on pools that nothing was trained on."""
    return make_trainer(folder, planted, model).evaluate()["eval_greedy_reward"]


def scores_by_source(log, source):
    return [score for row in log for score, name in zip(row["scores"], row["source"], strict=True) if name == source]


@pytest.mark.parametrize("seed", [0, 1])
def test_training_is_iterated_on_what_the_policy_proposes(tmp_path, seed):
    planted = Planted(seed)
    task = planted_task(tmp_path, planted)

    def make_log(name, **options):
        arguments = GenerateArguments(
            **task, query_ids=list(range(TRAIN)), score="log_prob", beam_size=1, random_sequences=4,
            seed=seed, output_dir=str(tmp_path / name), **options,
        )  # fmt: skip
        return generate(arguments, PlantedScorer(planted.embeddings))

    def load(*logs):
        return load_beams(list(map(str, logs)), shots=2, cache_dir=str(tmp_path / "cache"))

    first = make_log("first")
    args = SelectorSFTConfig(
        output_dir=str(tmp_path / "sft"), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=3e-3,
        num_beams=1, seed=seed, eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
        report_to="none", use_cpu=True, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    sft = SelectorSFTTrainer(make_selector(seed), args, planted.collator, load(first))
    sft.remove_callback(PrinterCallback)
    sft.train()
    sft.save_model(str(tmp_path / "selector"))

    second = make_log("second", selector=str(tmp_path / "selector"), selector_sequences=6)
    log = load(first, second)
    assert sorted(log["query_id"]) == sorted([*range(TRAIN), *range(TRAIN)])  # a group of each log
    assert set(scores_by_source(load(first), "selector")) == set()
    proposed, drawn = (scores_by_source(load(second), source) for source in ("selector", "random"))
    assert np.mean(proposed) > np.mean(drawn)  # what the policy proposes is the policy's, not chance

    start = greedy_reward(tmp_path / "a", planted, load_selector(tmp_path / "selector"))
    trainer = make_trainer(tmp_path / "grpo", planted, load_selector(tmp_path / "selector"), train=log, seed=seed)
    trainer.train()
    assert trainer.state.global_step >= 2
    assert greedy_reward(tmp_path / "b", planted, trainer.model) > start
