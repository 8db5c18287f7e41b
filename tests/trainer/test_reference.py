import pytest
import torch
from planted import make_selector, make_trainer, to_dataset, weights_of
from test_invariance import ragged_rows

from lever_grpo.trainer.reference import REFERENCE_COLUMN


QUIET = {"eval_strategy": "no", "save_strategy": "no"}
ESTIMATED = {"kl_estimator": "k3", "rce_epochs": 0, "beta": 0.5}


def test_column_holds_the_live_values(planted, tmp_path):
    rows = ragged_rows(planted)
    trainer = make_trainer(
        tmp_path, planted, make_selector(dropout=0.5), train=to_dataset(rows), precompute_ref_log_probs=True,
        per_device_eval_batch_size=2, **ESTIMATED,
    )  # fmt: skip
    batch = trainer.data_collator(list(trainer.train_dataset))
    live = trainer.policy(trainer.reference, batch).log_probs  # in evaluation mode, whatever the dropout
    torch.testing.assert_close(batch[REFERENCE_COLUMN], live, rtol=1e-5, atol=1e-6)
    for row, original in zip(trainer.train_dataset, rows, strict=True):
        assert [len(values) for values in row[REFERENCE_COLUMN]] == [len(s) for s in original["sequences"]]
        assert row["sequences"] == original["sequences"] and row["query_id"] == original["query_id"]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_training_is_the_same_and_runs_no_reference(planted, tmp_path, estimator):
    runs = {}
    for precompute in (False, True):
        options = {
            **ESTIMATED,
            "kl_estimator": estimator,
            "precompute_ref_log_probs": precompute,
            "learning_rate": 1e-3,
        }
        trainer = make_trainer(tmp_path, planted, **options, **QUIET)
        forwards = []
        trainer.reference.register_forward_hook(lambda *_, forwards=forwards: forwards.append(1))
        trainer.train()
        logs = [log for log in trainer.state.log_history if "kl" in log]
        runs[precompute] = (weights_of(trainer.model), [(log["loss"], log["kl"]) for log in logs], len(forwards))
    assert runs[True][2] == 0 and runs[False][2] == 6
    for a, b in zip(runs[True][1], runs[False][1], strict=True):
        assert a == pytest.approx(b, abs=1e-6)
    for name, value in runs[False][0].items():
        torch.testing.assert_close(runs[True][0][name], value, rtol=0, atol=1e-6)


def test_evaluation_needs_no_column(planted, tmp_path):
    trainer = make_trainer(tmp_path, planted, precompute_ref_log_probs=True, **ESTIMATED)
    assert REFERENCE_COLUMN not in trainer.eval_dataset.column_names
    assert trainer.evaluate()["eval_kl"] == pytest.approx(0.0, abs=1e-6)


def test_a_column_of_another_reference_is_replaced(planted, tmp_path):
    first = make_trainer(tmp_path, planted, make_selector(1), precompute_ref_log_probs=True, **ESTIMATED)
    options = {"train": first.train_dataset, "precompute_ref_log_probs": True, **ESTIMATED}
    second = make_trainer(tmp_path, planted, make_selector(2), **options)
    assert first.train_dataset[0][REFERENCE_COLUMN] != second.train_dataset[0][REFERENCE_COLUMN]


def test_resuming_from_another_start_is_refused(planted, tmp_path):
    options = {"precompute_ref_log_probs": True, **ESTIMATED}
    make_trainer(tmp_path, planted, make_selector(1), **options).train()
    make_trainer(tmp_path, planted, make_selector(1), **options).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    with pytest.raises(ValueError, match="another start"):
        trainer = make_trainer(tmp_path, planted, make_selector(2), **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
