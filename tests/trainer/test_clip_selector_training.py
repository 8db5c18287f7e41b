"""The end-to-end selector through the trainers, on images whose colour says what they are worth."""

import copy

import pytest
import torch
from planted import TRAIN, make_args
from small_clip import coloured_examples, coloured_log, make_clip, make_processor
from transformers import AutoModel, PrinterCallback

from lever_grpo import GroupBeamGRPOTrainer, SelectorSFTConfig, SelectorSFTTrainer
from lever_grpo.data import DataCollatorForRawBeams
from lever_grpo.models import ClipSelector


OPTIONS = {"hidden_dim": 16, "num_attention_heads": 2, "dropout": 0.0, "lora_rank": 4}
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}


class Coloured:
    def __init__(self):
        self.examples, red = coloured_examples()
        self.collator = DataCollatorForRawBeams(self.examples, make_processor())
        self.train = coloured_log(red, list(range(TRAIN)), group=6)
        self.validation = coloured_log(red, list(range(TRAIN, TRAIN + 4)), seed=1)


@pytest.fixture(scope="module")
def coloured():
    return Coloured()


def make_selector(**options):
    torch.manual_seed(0)
    return ClipSelector.from_clip(make_clip(), **{**OPTIONS, **options})


def make_trainer(folder, data, model, **options):
    args = make_args(folder, **options)
    trainer = GroupBeamGRPOTrainer(model, args, data.collator, data.train, data.validation)
    trainer.remove_callback(PrinterCallback)
    return trainer


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_moved(model, start, adapters=16):
    """CLIP is bit for bit where it was, and every adapter and the pointer network have moved."""
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, start[name])}
    assert sum("lora_" in name for name in moved) == adapters
    assert all("lora_" in name for name in moved if name.startswith("encoders."))
    assert {name for name in start if not name.startswith("encoders.")} - moved <= {"layers.0.k_proj.bias"}


def test_all_stages_train_adapters_and_pointer_and_leave_clip(coloured, tmp_path):
    model = make_selector()
    start = snapshot(model)
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    options |= {"save_strategy": "no", "eval_strategy": "no"}
    args = SelectorSFTConfig(output_dir=str(tmp_path / "sft"), num_beams=2, **options, **QUIET)
    sft = SelectorSFTTrainer(model, args, coloured.collator, coloured.train, coloured.validation)
    sft.remove_callback(PrinterCallback)
    sft.train()
    losses = [log["loss"] for log in sft.state.log_history if "loss" in log]
    assert len(losses) == 4 and torch.tensor(losses).isfinite().all()
    assert "eval_greedy_reward" in sft.evaluate()
    check_moved(model, start)

    model.save_pretrained(tmp_path / "start")
    loaded = AutoModel.from_pretrained(tmp_path / "start")
    before = snapshot(loaded)
    trainer = make_trainer(tmp_path / "grpo", coloured, loaded, load_best_model_at_end=False)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["stage"] for log in logs] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(torch.tensor([log["loss"], log.get("kl", 0.0)]).isfinite().all() for log in logs)
    assert max(log["kl"] for log in logs if log["stage"] > 0) > 0
    check_moved(trainer.model, before)
    for name, value in trainer.reference.named_parameters():
        assert torch.equal(value, before[name]) and not value.requires_grad, name
    now, old = snapshot(trainer.model), snapshot(trainer.old_policy)
    assert any("lora_" in name and not torch.equal(old[name], before[name]) for name in old)  # refreshed since
    trainer.refresh_old_policy()
    assert all(torch.equal(value, now[name]) for name, value in trainer.old_policy.named_parameters())

    trainer.model.eval().save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved")
    batch = coloured.collator(list(coloured.validation))
    with torch.no_grad():
        expected, output = (trainer.policy(policy, batch).log_probs for policy in (trainer.model, again))
    assert torch.equal(output, expected)
    assert torch.equal(trainer.greedy_picks(again, batch), trainer.greedy_picks(trainer.model, batch))


@pytest.mark.parametrize("modality", ["image", "text"])
def test_one_modality_trains(coloured, tmp_path, modality):
    data = copy.copy(coloured)
    examples = [row for row in coloured.examples if modality == "text" or row.image is not None]
    have = {row.id for row in examples}

    def known(row):
        return {row["query_id"], *row["candidate_ids"]} <= have

    data.train, data.validation = coloured.train.filter(known), coloured.validation.filter(known)
    assert len(data.train) >= 4 and len(data.validation)
    data.collator = DataCollatorForRawBeams(examples, make_processor(), [modality])
    model = make_selector(modalities=[modality])
    start = snapshot(model)
    trainer = make_trainer(tmp_path, data, model, rce_epochs=0, max_steps=3, eval_strategy="no", save_strategy="no")
    trainer.train()
    check_moved(model, start, adapters=8)


def test_it_learns_what_the_images_show(coloured, tmp_path):
    """All texts are alike but for a number: only the images tell which demonstrations are worth more."""
    options = {"rce_epochs": 8, "grpo_epochs": 2, "curriculum_epochs": 1, "rce_learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, coloured, make_selector(), save_strategy="no", eval_strategy="no", **options)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    spread = max(max(row["scores"]) - min(row["scores"]) for row in coloured.validation)
    assert after["eval_greedy_reward"] > before["eval_greedy_reward"] + 0.1 * spread
    assert after["eval_rank_correlation"] > 0.5 > before["eval_rank_correlation"]


def test_a_resumed_run_equals_one_that_was_not_interrupted(coloured, tmp_path):
    runs = []
    for resume in (False, True):
        trainer = make_trainer(tmp_path, coloured, make_selector(dropout=0.1), seed=3)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if resume else None)
        runs.append(snapshot(trainer.model))
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_reference_log_probs_can_be_precomputed(coloured, tmp_path):
    trainer = make_trainer(
        tmp_path, coloured, make_selector(), rce_epochs=0, kl_estimator="k3", precompute_ref_log_probs=True
    )
    batch = trainer.data_collator(list(trainer.train_dataset)[:3])
    live = trainer.policy(trainer.reference, batch).log_probs
    torch.testing.assert_close(batch["ref_log_probs"], live, rtol=1e-5, atol=1e-6)


def test_rewards_of_given_embeddings_are_refused(coloured, tmp_path):
    options = {"reward_weights": {"beam": 1.0, "diversity": 0.5}, "eval_strategy": "no", "save_strategy": "no"}
    trainer = make_trainer(tmp_path, coloured, make_selector(), **options)
    with pytest.raises(ValueError, match="'coherence' and 'diversity' compare given embeddings"):
        trainer.group_rewards(coloured.collator(list(coloured.train)[:2]))
