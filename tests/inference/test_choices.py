import numpy as np
import pytest
import torch
from datasets import Dataset
from planted import TRAIN, VALIDATION, make_selector, planted_rows, to_dataset

from lever_grpo.inference import choose, evaluate_selectors


@pytest.fixture
def heldout(planted):
    return to_dataset(planted_rows(planted.embeddings, list(range(TRAIN, TRAIN + VALIDATION)), seed=4))


def by_name(results) -> dict:
    return {result.name: result for result in results}


def test_choices_do_not_depend_on_the_batch(planted, heldout):
    selector = make_selector(dropout=0.5).train()
    picks = choose(selector, heldout, planted.collator)
    assert picks.shape == (8, 2) and not selector.training  # no dropout while choosing
    assert choose(selector, heldout, planted.collator, batch_size=3).tolist() == picks.tolist()
    assert choose(selector, heldout, planted.collator, num_shots=3)[:, :2].tolist() == picks.tolist()


def test_untrained_prior_chooses_the_most_similar(planted, heldout):
    picks = choose(make_selector(similarity_prior=True), heldout, planted.collator)
    for row, pick in zip(heldout, picks.tolist(), strict=True):
        cosine = planted.embeddings[row["candidate_ids"]] @ planted.embeddings[row["query_id"]]
        assert pick == np.argsort(-cosine)[:2].tolist()


def test_results_on_fully_scored_queries(planted, heldout):
    selectors = {"similarity": make_selector(similarity_prior=True), "grpo": make_selector(1)}
    results = by_name(evaluate_selectors(selectors, heldout, planted.collator))
    assert list(results) == ["zero_shot", "random", "similarity", "grpo", "oracle"]
    scores = np.array(heldout["scores"][:])
    assert results["zero_shot"].rewards.tolist() == [[-3.5] * 8]
    np.testing.assert_allclose(results["random"].rewards[0], scores.mean(axis=1))
    np.testing.assert_allclose(results["oracle"].rewards[0], scores.max(axis=1))
    correct = np.array([columns["correct"] for columns in heldout["columns"]])
    np.testing.assert_allclose(results["random"].correct[0], correct.mean(axis=1))
    np.testing.assert_allclose(results["oracle"].correct[0], correct[range(8), scores.argmax(axis=1)])
    picks = choose(selectors["grpo"], heldout, planted.collator)
    for q, (row, pick) in enumerate(zip(heldout, picks.tolist(), strict=True)):
        i = row["sequences"].index(pick)
        assert results["grpo"].rewards[0, q] == row["scores"][i]
        assert results["grpo"].correct[0, q] == row["columns"]["correct"][i]
    assert (results["oracle"].rewards >= results["grpo"].rewards).all()


def test_accuracy_is_left_out_where_it_is_not_known(planted, heldout):
    """As in a log of which only the survivors were judged."""
    known = [row["columns"]["correct"] for row in heldout]
    rows = [{**row, "columns": {"correct": [*row["columns"]["correct"][:-1], None]}} for row in heldout]
    results = evaluate_selectors({"sft": make_selector()}, to_dataset(rows), planted.collator)
    assert [result.name for result in results] == ["zero_shot", "random", "sft", "oracle"]
    assert [result.correct for result in results] == [None] * 4
    # a second column that is known everywhere takes the place of the first
    for row, values in zip(rows, known, strict=True):
        row["columns"]["vqa_correct"] = values
    results = by_name(evaluate_selectors({"sft": make_selector()}, Dataset.from_list(rows), planted.collator))
    np.testing.assert_allclose(results["random"].correct[0], np.mean(known, axis=1))


@torch.no_grad()
def log_probs_of(selector, planted, row):
    """Of the logged sequences of one query alone."""
    output = selector(
        query_embeds=torch.from_numpy(planted.embeddings[[row["query_id"]]]),
        candidate_embeds=torch.from_numpy(planted.embeddings[row["candidate_ids"]])[None],
        sequences=torch.tensor([row["sequences"]]),
    )
    return output.log_probs.sum(-1)[0].double()


def test_results_on_partly_scored_queries_are_expectations(planted):
    log = planted.train.select(range(5))
    selector = make_selector(1)
    results = by_name(evaluate_selectors({"grpo": selector}, log, planted.collator))
    for q, row in enumerate(log):
        expected = (log_probs_of(selector, planted, row).softmax(-1).numpy() * row["scores"]).sum()
        assert results["grpo"].rewards[0, q] == pytest.approx(expected, rel=1e-5)
    assert results["grpo"].picks is None and results["grpo"].percentiles is None


def test_agreement_of_log_probabilities_and_scores(planted):
    rows = planted_rows(planted.embeddings, list(range(TRAIN, TRAIN + VALIDATION)), seed=4)
    rows += planted_rows(planted.embeddings, list(range(12)), pool=4, seed=5)  # more than a batch, of two group sizes
    selectors = {"sft": make_selector(1), "sure": make_selector(similarity_prior=True, prior_scale=30.0)}
    results = by_name(evaluate_selectors(selectors, to_dataset(rows), planted.collator))
    for name, selector in selectors.items():
        policies = [log_probs_of(selector, planted, row) for row in rows]
        targets = [torch.tensor(row["scores"], dtype=torch.float64) for row in rows]
        if name == "sft":  # with no two log-probabilities or scores equal, Spearman's is the correlation of the ranks
            ranks = [[x.argsort().argsort() for x in pair] for pair in zip(policies, targets, strict=True)]
            expected = np.mean([np.corrcoef(*pair)[0, 1] for pair in ranks])
            assert results[name].rank_correlation.tolist() == pytest.approx([expected], abs=1e-5)
        errors = []
        for inverse in np.linspace(0.0, 5.0, 501):
            pairs = [
                (p.log_softmax(-1), (inverse * t).log_softmax(-1)) for p, t in zip(policies, targets, strict=True)
            ]
            errors.append(np.mean([float((p.exp() * (p - t)).sum()) for p, t in pairs]))
        assert results[name].calibration_error.tolist() == pytest.approx([min(errors)], rel=1e-3, abs=1e-5)
    assert results["sure"].calibration_error > 2 * results["sft"].calibration_error
    assert results["random"].rank_correlation is None and results["oracle"].calibration_error is None


def test_no_rank_correlation_where_all_scores_tie(planted, heldout):
    rows = [{**row, "scores": [-1.0] * len(row["scores"])} for row in heldout]
    results = by_name(evaluate_selectors({"sft": make_selector()}, to_dataset(rows), planted.collator))
    assert results["sft"].rank_correlation is None and results["sft"].calibration_error > 0  # no reward pays


def test_zero_shot_is_left_out_where_it_is_unknown(planted, heldout):
    rows = list(heldout)
    rows[3] = {**rows[3], "zero_shot": None}
    results = by_name(evaluate_selectors({}, to_dataset(rows), planted.collator))
    assert list(results) == ["random", "oracle"]
