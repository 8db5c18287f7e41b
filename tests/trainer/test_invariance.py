"""Padding, accumulation and the number of processes change nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import Planted, make_selector, make_trainer, planted_rows, to_dataset, weights_of

from lever_grpo.trainer.group_beam_grpo_config import KL_ESTIMATORS


QUIET = {"eval_strategy": "no", "save_strategy": "no"}
TESTS = Path(__file__).resolve().parents[1]


def ragged_rows(planted: Planted) -> list[dict]:
    """Groups of 20 to 2 sequences, pools of 6 to 3, one to three shots (also within a group), one of them tied."""
    rows = [
        *planted_rows(planted.embeddings, [0], pool=5),
        *planted_rows(planted.embeddings, [1], pool=6, group=6, shots=3),
        *planted_rows(planted.embeddings, [2], pool=3, shots=1),
        *planted_rows(planted.embeddings, [3], pool=4, group=2),
    ]
    mixed = planted_rows(planted.embeddings, [4], pool=4, group=4, shots=3)[0]
    mixed["sequences"] = [sequence[: 1 + i % 3] for i, sequence in enumerate(mixed["sequences"])]
    return [*rows, mixed, {**rows[1], "query_id": 5, "scores": [1.0] * 6}]


def moved(trainer):
    """A policy that is neither π_old nor π_ref."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return trainer


LOSSES = [
    *({"loss_type": name} for name in ("grpo", "cispo", "sapo", "rwr", "listwise_kl", "asymre", "dr_grpo")),
    *({"importance_sampling_level": name} for name in ("token", "sequence")),
    *({"kl_estimator": name, "kl_direction": "forward"} for name in KL_ESTIMATORS),
    {"scale_rewards": "rank", "entropy_coef": 0.3},
    {"curriculum_first": True},
]


@pytest.mark.parametrize("stage, top_k", [("rce", None), ("grpo_early", 3), ("grpo_late", None)])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_padding_changes_no_loss(planted, tmp_path, options, stage, top_k):
    rows = ragged_rows(planted)
    model = make_selector(similarity_prior=True, num_set_layers=1)
    trainer = moved(make_trainer(tmp_path, planted, model, train=to_dataset(rows), beta=1.0, **options))
    trainer.policy_control.stage, trainer.policy_control.top_k = stage, top_k
    trainer.model.eval()

    def losses_of(some):
        batch = planted.collator(list(to_dataset(some)))
        return trainer.group_losses(trainer.model, batch, trainer.group_rewards(batch))[:2]

    together, live = losses_of(rows)
    alone = [losses_of([row]) for row in rows]
    torch.testing.assert_close(together, torch.cat([losses for losses, _ in alone]), rtol=1e-4, atol=1e-6)
    assert live.tolist() == [flag.item() for _, flag in alone] == [True] * 5 + [stage == "rce"]

    batch = planted.collator(list(to_dataset(rows)))
    mean = sum(losses.item() for losses, flag in alone if flag) / sum(flag.item() for _, flag in alone)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(mean, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_accumulation_changes_nothing(planted, tmp_path, scale):
    rows = [*planted.rows[:15], *ragged_rows(planted)]  # micro-batches of different shapes and numbers of live groups
    runs = {}
    for size, steps in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            tmp_path,
            planted,
            train=to_dataset(rows),
            scale_rewards=scale,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            learning_rate=0.05,
            rce_learning_rate=0.05,
            optim="sgd",
            **QUIET,
        )
        # not Adam: it turns the rounding of zero gradients, such as those of key biases, into steps
        trainer.train()
        runs[size] = (weights_of(trainer.model), [log for log in trainer.state.log_history if "learning_rate" in log])
    weights, logs = runs[4]
    assert len(logs) == 18
    for other, other_logs in (runs[1], runs[2]):
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-6)
        for log, other_log in zip(logs, other_logs, strict=True):
            names = log.keys() - {"epoch"}  # counted in micro-batches
            assert {n: other_log[n] for n in names} == pytest.approx({n: log[n] for n in names}, rel=1e-3, abs=1e-5)


def train_on(folder: Path, size: int) -> dict:
    """Uneven numbers of live groups and of held-out queries on the processes; scaled by the batch; adaptive."""
    planted = Planted()
    rows = [{**row, "scores": [0.1] * 6} if i % 5 == 1 else row for i, row in enumerate(planted.rows)]
    trainer = make_trainer(
        folder, planted, make_selector(similarity_prior=True), train=to_dataset(rows), adaptive_beta=True,
        learning_rate=2e-3, scale_rewards="batch", per_device_train_batch_size=size, per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer.train()
    weights = {name: value.tolist() for name, value in trainer.model.state_dict().items() if "k_proj.bias" not in name}
    log = trainer.state.log_history
    return {"world_size": trainer.accelerator.num_processes, "log": log, "weights": weights}


def test_two_processes_equal_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "result.json").read_text())
    one = train_on(tmp_path / "one", size=8)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert len(one["log"]) == len(two["log"]) == 14  # 9 steps, 4 evaluations, the end
    for a, b in zip(one["log"][:-1], two["log"][:-1], strict=True):
        for name in a:
            if not name.endswith(("runtime", "per_second")):
                assert b[name] == pytest.approx(a[name], rel=0 if name.endswith("loss") else 1e-5, abs=1e-5), name
    for name, value in one["weights"].items():
        torch.testing.assert_close(torch.tensor(two["weights"][name]), torch.tensor(value), rtol=0, atol=1e-5)


if __name__ == "__main__":  # what each of the two processes runs
    result = train_on(Path(sys.argv[1]) / "two", size=4)
    if int(os.environ["RANK"]) == 0:
        Path(sys.argv[1], "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
