"""Selectors that may stop: the trainers charge the stop like a pick, and the policy learns when it is enough."""

import numpy as np
import pytest
import torch
from planted import POOL, ROWS, TRAIN, VALIDATION, make_selector, make_trainer, to_dataset

from lever_grpo import SelectorSFTConfig, SelectorSFTTrainer
from lever_grpo.trainer.reference import REFERENCE_COLUMN


def rows_of_any_length(embeddings, queries, seed=0):
    """Singles and pairs. What the first number of a query says is whether one demonstration is enough."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in queries:
        candidates = rng.choice(np.arange(TRAIN + VALIDATION, ROWS), POOL, replace=False).tolist()
        sequences = [[i] for i in range(POOL)] + [[i, j] for i in range(POOL) for j in range(POOL) if i != j][::3]
        wanted = 1 if embeddings[query, 0] > 0 else 2
        scores = [-abs(len(s) - wanted) + 0.1 * float(embeddings[candidates[s[0]], 1]) for s in sequences]
        rows.append(
            {
                "query_id": query, "candidate_ids": candidates, "sequences": sequences, "scores": scores,
                "survived": [True] * len(scores), "zero_shot": -3.0, "columns": {"correct": [0.0] * len(scores)},
            }
        )  # fmt: skip
    return rows


@torch.no_grad()
def right_lengths(selector, data, rows, num_shots=2):
    """Share of the queries for which greedy decoding stops where it should."""
    batch = data.collator(rows)
    inputs = {name: batch[name] for name in ("query_embeds", "candidate_embeds", "candidate_indices")}
    lengths = (selector.eval().select(**inputs, num_shots=num_shots).sequences[:, 0] >= 0).sum(-1)
    wanted = [1 if data.embeddings[row["query_id"], 0] > 0 else 2 for row in rows]
    return (lengths == torch.tensor(wanted)).float().mean().item()


def trained(start, planted, train, held, tmp_path):
    """By SFT and then GRPO."""
    sft = SelectorSFTTrainer(
        start,
        SelectorSFTConfig(
            output_dir=str(tmp_path / "sft"), num_train_epochs=2, learning_rate=3e-3, report_to="none", use_cpu=True,
            per_device_train_batch_size=8, dataloader_pin_memory=False, save_strategy="no", eval_strategy="no",
            load_best_model_at_end=False,
        ),
        planted.collator, to_dataset(train), to_dataset(held),
    )  # fmt: skip
    sft.train()
    trainer = make_trainer(
        tmp_path / "grpo", planted, sft.model, train=to_dataset(train), validation=to_dataset(held), grpo_epochs=12,
        learning_rate=0.02, save_strategy="no", eval_strategy="no", load_best_model_at_end=False,
        restore_best=False,
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"similarity_prior": True, "prior_rank": 2}], ids=["v3", "prior"])
def test_the_policy_learns_when_it_is_enough(options, planted, tmp_path):
    rows = rows_of_any_length(planted.embeddings, list(range(TRAIN + VALIDATION)))
    train, held = rows[:TRAIN], rows[TRAIN:]
    start = make_selector(stop=True, max_shots=2, encoder="bi_encoder", **options)
    before = right_lengths(start, planted, train)
    trainer = trained(start, planted, train, held, tmp_path)
    assert right_lengths(trainer.model, planted, train) > max(0.9, before + 0.2)
    assert right_lengths(trainer.model, planted, held) > 0.7
    logs = [log for log in trainer.state.log_history if "kl" in log]
    assert logs and all(np.isfinite([log["loss"], log["kl"], log["entropy"]]).all() for log in logs)
    assert np.isfinite(trainer.evaluate()["eval_greedy_reward"])


def test_without_the_action_no_number_of_shots_is_right_for_all(planted, tmp_path):
    rows = rows_of_any_length(planted.embeddings, list(range(TRAIN + VALIDATION)))
    start = make_selector(max_shots=2, encoder="bi_encoder")
    trainer = trained(start, planted, rows[:TRAIN], rows[TRAIN:], tmp_path)
    assert max(right_lengths(trainer.model, planted, rows, shots) for shots in (1, 2)) < 0.7


def test_stored_log_probs_of_the_reference_hold_the_stop(planted, tmp_path):
    rows = rows_of_any_length(planted.embeddings, list(range(6)))
    trainer = make_trainer(
        tmp_path, planted, make_selector(stop=True, max_shots=2), train=to_dataset(rows),
        precompute_ref_log_probs=True, kl_estimator="k3", rce_epochs=0, beta=0.5,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    live = trainer.policy(trainer.reference, batch)
    assert live.log_probs.shape[-1] == 3 and (live.log_probs[:, :POOL, 1] < 0).all()  # a single, and its stop
    torch.testing.assert_close(batch[REFERENCE_COLUMN], live.log_probs, rtol=1e-5, atol=1e-6)


def test_kl_and_entropy_count_the_stop(planted, tmp_path):
    rows = rows_of_any_length(planted.embeddings, list(range(3)))
    trainer = make_trainer(
        tmp_path, planted, make_selector(stop=True, max_shots=2), train=to_dataset(rows), validation=to_dataset(rows)
    )
    with torch.no_grad():
        trainer.model.stop_head.bias.fill_(1.0)  # the reference's is 0
    metrics = trainer.evaluate()
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    with torch.no_grad():
        ours = trainer.policy(trainer.model.eval(), inputs, return_step_log_probs=True)
        theirs = trainer.policy(trainer.reference, inputs, return_step_log_probs=True)
    kls, entropies = [], []
    for q, row in enumerate(rows):
        steps = []
        for g, sequence in enumerate(row["sequences"]):
            # two steps each: the picks of a pair, which ends unasked, or the pick of a single and its stop
            for t in range(2):
                p, r = ours.step_log_probs[q, g, t], theirs.step_log_probs[q, g, t]
                known = p > -torch.inf
                kl = (p.exp() * (p - r))[known].sum().item()
                steps.append((kl, -(p.exp() * p)[known].sum().item()))
                assert t == 1 or kl == pytest.approx(0.0, abs=1e-6), sequence
        kls.append(np.mean([kl for kl, _ in steps]))
        entropies.append(np.mean([entropy for _, entropy in steps]))
    assert metrics["eval_kl"] == pytest.approx(np.mean(kls), abs=1e-5) and np.mean(kls) > 0.01
    assert metrics["eval_entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)
