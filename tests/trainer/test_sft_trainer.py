import numpy as np
import pytest
import torch
from planted import make_selector, to_dataset, weights_of

from lever_grpo import SelectorSFTConfig, SelectorSFTTrainer


def make_sft(folder, planted, **options):
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "dataloader_pin_memory": False}
    defaults |= {"per_device_train_batch_size": 8, "num_train_epochs": 1, "logging_steps": 1, "disable_tqdm": True}
    args = SelectorSFTConfig(**{**defaults, **options})
    return SelectorSFTTrainer(make_selector(), args, planted.collator, planted.train, planted.validation)


@pytest.mark.parametrize("beams", [1, 2, 100])
def test_loss_is_the_cross_entropy_of_the_best_beams(planted, tmp_path, beams):
    trainer = make_sft(tmp_path, planted, num_beams=beams)
    rows = [planted.rows[0], {**planted.rows[1], "sequences": [[0, 1], [2, 3]], "scores": [0.1, 0.2]}]
    rows[1] |= {"survived": [True, True], "columns": {"correct": [0.0, 1.0]}}
    batch = planted.collator(list(to_dataset(rows)))
    expected = []
    for row in rows:
        sides = {
            "query_embeds": torch.from_numpy(planted.embeddings[[row["query_id"]]]),
            "candidate_embeds": torch.from_numpy(planted.embeddings[row["candidate_ids"]])[None],
        }
        best = np.argsort(row["scores"])[::-1][:beams]
        log_probs = []
        for i in best:
            steps = trainer.model(
                **sides, sequences=torch.tensor([[row["sequences"][i]]]), return_step_log_probs=True
            ).step_log_probs[0, 0]
            log_probs.append(sum(steps[t, pick].item() for t, pick in enumerate(row["sequences"][i])))
        expected.append(-np.mean(log_probs))
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_it_imitates(planted, tmp_path):
    trainer = make_sft(tmp_path, planted, num_train_epochs=8, learning_rate=0.02, num_beams=1)
    start = weights_of(trainer.model)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert logs[0]["step"] == 0 and trainer.state.best_global_step > 0
    assert min(log["eval_loss"] for log in logs) < logs[0]["eval_loss"] - 0.1
    assert max(log["eval_greedy_reward"] for log in logs) > logs[0]["eval_greedy_reward"] + 0.2
    assert any(not torch.equal(value, start[name]) for name, value in weights_of(trainer.model).items())


def test_a_harmful_stage_ends_with_the_start(planted, tmp_path):
    trainer = make_sft(tmp_path, planted, learning_rate=1e-12, weight_decay=0.0)
    start = weights_of(trainer.model)
    trainer.train()
    # no checkpoint is better than the start: the first of equals is kept
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-0")
    assert all(torch.equal(value, start[name]) for name, value in weights_of(trainer.model).items())
