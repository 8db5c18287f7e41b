"""Which checkpoints are whole, what they hold, and that training goes on from them as if nothing had happened."""

import json
import shutil

import pytest
import torch
from planted import assert_same_weights, make_selector, make_trainer, weights_of

from lever_grpo.trainer import last_checkpoint
from lever_grpo.trainer.checkpoints import find_damage


STEPS = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}


@pytest.fixture(scope="module")
def finished(planted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, planted).train()
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_the_last_whole_checkpoint(run):
    assert last_checkpoint(run) == str(run / "checkpoint-9")
    assert find_damage(run / "checkpoint-0") is None


def test_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "absent") is None


def test_names_that_are_no_checkpoints(run):
    (run / "checkpoint-99-old").mkdir()
    (run / "checkpoint-final").mkdir()
    assert last_checkpoint(run) == str(run / "checkpoint-9")


FILES = ["trainer_state.json", "training_memory.json", "model.safetensors", "optimizer.pt", "rng_state.pth"]


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_without_a_file_is_passed_over(run, name, caplog):
    (run / "checkpoint-9" / name).unlink()
    assert last_checkpoint(run) == str(run / "checkpoint-6")
    assert "checkpoint-9 is not whole (no " in caplog.text


@pytest.mark.parametrize("name", [*FILES, "frozen_policies.safetensors", "scheduler.pt"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_checkpoint_with_a_file_cut_off_is_passed_over(run, name, share):
    path = run / "checkpoint-9" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert last_checkpoint(run) == str(run / "checkpoint-6")


def test_all_are_damaged(run):
    for path in run.glob("checkpoint-*"):
        (path / "trainer_state.json").write_text("{")
    assert last_checkpoint(run) is None


def make_forgetful(folder, planted):
    """Everything that has a memory: dropout, Adam, accumulation, π_old, adaptive β and temperature, half-full logs."""
    model = make_selector(dropout=0.2, similarity_prior=True, num_set_layers=1)
    options = {"adaptive_beta": True, "adaptive_temperature": True, "kl_high": 0.02, "logging_steps": 2, **STEPS}
    return make_trainer(
        folder, planted, model, gradient_accumulation_steps=2, per_device_train_batch_size=4, **options
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(planted, tmp_path_factory):
    trainer = make_forgetful(tmp_path_factory.mktemp("whole"), planted)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stop", range(10))
def test_resuming_anywhere_gives_the_same(planted, tmp_path, whole, stop):
    """Through all stages, log included."""
    run = shutil.copytree(whole.args.output_dir, tmp_path / "run")
    for path in run.glob("checkpoint-*"):  # as if it had been cut off behind this step
        if int(path.name.split("-")[1]) > stop:
            shutil.rmtree(path)
    shutil.rmtree(run / "rce")
    again = make_forgetful(run, planted)
    checkpoint = last_checkpoint(run)
    assert checkpoint.endswith(f"checkpoint-{stop}")
    again.train(resume_from_checkpoint=checkpoint)

    assert_same_weights(weights_of(again.model), weights_of(whole.model))
    assert_same_weights(weights_of(again.old_policy), weights_of(whole.old_policy))
    assert again.policy_control == whole.policy_control
    assert again.state.best_global_step == whole.state.best_global_step
    assert (run / "rce").exists() == (stop <= 3)

    def comparable(log):
        timing = ("runtime", "per_second", "train_loss", "flos")
        return {name: value for name, value in log.items() if not name.endswith(timing)}

    assert [comparable(log) for log in again.state.log_history] == [comparable(log) for log in whole.state.log_history]


def test_memory_of_a_checkpoint(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, adaptive_beta=True, kl_high=1e-6, kl_low=0.0, logging_steps=2, **STEPS)
    trainer.train()
    memory = json.loads((tmp_path / "checkpoint-7" / "training_memory.json").read_text())
    assert memory["control"]["stage"] == "grpo_late" and memory["control"]["beta"] > 0.1
    assert memory["counts"]["kl"] == 8  # the groups of the step since the last log
    again = make_trainer(tmp_path, planted, **STEPS)
    again.load_training_memory(memory)
    assert again.training_memory() == memory


def test_a_run_that_was_moved_keeps_its_start(planted, tmp_path):
    options = {"train": planted.train, "learning_rate": 1e-12, "rce_learning_rate": 1e-12, "weight_decay": 0.0}
    first = make_trainer(tmp_path / "here", planted, **options)
    first.train()
    assert first.state.best_global_step == 0
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = make_trainer(tmp_path / "there", planted, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "there" / "checkpoint-6"))
    assert again.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-0")
    start = weights_of(make_selector())
    assert_same_weights(weights_of(again.model), start)
    assert not torch.equal(next(iter(start.values())), torch.zeros(1))
