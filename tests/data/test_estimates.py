import logging
import math
from itertools import permutations

import numpy as np
import pytest
from datasets import Dataset

from lever_grpo.data import complete_scores, fully_scored
from lever_grpo.data.records import BeamDataError


def log_of(
    queries: int, pool: int = 5, scored: int = 8, noise: float = 0.0, seed: int = 0, first: int = 0
) -> list[dict]:
    """Singles, and some pairs that are worth twice their first single and once their second."""
    rng = np.random.default_rng(seed)
    rows = []
    for query in range(first, first + queries):
        single = rng.normal(size=pool) - 2
        pairs = [list(p) for p in permutations(range(pool), 2)]
        kept = [pairs[i] for i in rng.permutation(len(pairs))[:scored]]
        sequences = [[i] for i in range(pool)] + kept
        scores = [*single, *(2 * single[a] + single[b] + noise * rng.normal() for a, b in kept)]
        rows.append(
            {
                "query_id": query, "candidate_ids": list(range(100, 100 + pool)), "sequences": sequences,
                "scores": [float(s) for s in scores], "zero_shot": -3.0,
            }
        )  # fmt: skip
    return rows


def test_scored_sequences_keep_their_scores():
    rows = log_of(3, noise=1.0)
    full = complete_scores(Dataset.from_list(rows))
    assert full["query_id"][:] == [0, 1, 2]
    for row, done in zip(rows, full, strict=True):
        assert sorted(map(tuple, done["sequences"])) == sorted(permutations(range(5), 2))
        known = dict(zip(map(tuple, row["sequences"]), row["scores"], strict=True))
        for sequence, score, estimated in zip(
            map(tuple, done["sequences"]), done["scores"], done["estimated"], strict=True
        ):
            assert estimated == (sequence not in known)
            assert estimated or score == known[sequence]
        assert done["candidate_ids"] == row["candidate_ids"] and done["zero_shot"] == -3.0
    assert fully_scored(full) and not fully_scored(Dataset.from_list(rows))


def test_a_reordering_is_the_estimate_where_it_was_scored():
    rows = log_of(4, noise=5.0)
    for row, done in zip(rows, complete_scores(Dataset.from_list(rows)), strict=True):
        known = dict(zip(map(tuple, row["sequences"]), row["scores"], strict=True))
        found = dict(zip(map(tuple, done["sequences"]), done["scores"], strict=True))
        turned = [s for s in found if s not in known and s[::-1] in known]
        assert turned and all(found[s] == known[s[::-1]] for s in turned)


def test_regression_finds_what_singles_say():
    rows = log_of(20, scored=6)
    for row, done in zip(rows, complete_scores(Dataset.from_list(rows)), strict=True):
        single = row["scores"][:5]
        known = {tuple(sorted(s)) for s in row["sequences"]}
        for (a, b), score in zip(done["sequences"], done["scores"], strict=True):
            if tuple(sorted((a, b))) not in known:
                assert score == pytest.approx(2 * single[a] + single[b], abs=0.1)


def test_more_queries_to_fit_on_help_and_those_asked_for_count_once(caplog):
    asked, others = log_of(1, scored=1, seed=1), log_of(30, seed=2, first=50)

    def error(fit_on):
        done = complete_scores(Dataset.from_list(asked), fit_on=fit_on)[0]
        single = asked[0]["scores"][:5]
        return np.mean(
            [abs(2 * single[a] + single[b] - x) for (a, b), x in zip(done["sequences"], done["scores"], strict=True)]
        )

    assert error(Dataset.from_list(others)) < 0.5 * error(None)
    # the same queries given twice change nothing, and R² is of queries that the fit has not seen
    noisy = Dataset.from_list(log_of(12, noise=50.0))
    with caplog.at_level(logging.INFO, "lever_grpo.data.estimates"):
        once, twice = complete_scores(noisy), complete_scores(noisy, fit_on=noisy)
    assert once["scores"][:] == twice["scores"][:]
    measured = {record.getMessage().split(": ")[-1] for record in caplog.records}
    assert len(measured) == 1 and float(measured.pop()) < 0.1


def test_other_lengths():
    rows = log_of(2, pool=4)
    for row in rows:
        row["sequences"].append([3, 2, 1])
        row["scores"].append(1.25)
    full = complete_scores(Dataset.from_list(rows), shots=3)
    assert len(full[0]["sequences"]) == 24
    assert full[0]["scores"][full[0]["sequences"].index([1, 2, 3])] == 1.25  # its only scored reordering


@pytest.mark.parametrize(
    "change, options, message",
    [
        (
            lambda row: row.update(sequences=row["sequences"][1:], scores=row["scores"][1:]),
            {},
            "query 0: 1 candidates",
        ),
        (lambda row: None, {"shots": 3}, "no sequence of 3 shots was scored"),
    ],
)
def test_logs_that_cannot_be_completed(change, options, message):
    rows = log_of(2)
    for row in rows:
        change(row)
    with pytest.raises(BeamDataError, match=message):
        complete_scores(Dataset.from_list(rows), **options)


def test_pools_that_are_too_large():
    pool = 150
    row = {"query_id": 7, "candidate_ids": list(range(pool)), "sequences": [*([i] for i in range(pool)), [0, 1]]}
    row |= {"scores": [float(i) for i in range(pool + 1)], "zero_shot": math.nan}
    with pytest.raises(BeamDataError, match="query 7: a pool of 150 has 22350 sequences"):
        complete_scores(Dataset.from_list([row]))


def test_fully_scored_is_exact():
    def row(sequences, pool=3):
        return {"query_id": 0, "candidate_ids": list(range(pool)), "sequences": sequences}

    pairs = [list(p) for p in permutations(range(3), 2)]
    assert fully_scored(Dataset.from_list([row(pairs), row([[0]], pool=1)]))
    assert not fully_scored(Dataset.from_list([row(pairs), row(pairs[:-1])]))
    # as many sequences as there are pairs, but not every pair
    assert not fully_scored(Dataset.from_list([row([[0], [1], [2], *pairs[:3]])]))
    assert not fully_scored(Dataset.from_list([row([*pairs[:5], pairs[0]])]))
    # of any length: every single too
    assert not fully_scored(Dataset.from_list([row(pairs)]), any_length=True)
    assert fully_scored(Dataset.from_list([row([[0], [1], [2], *pairs])]), any_length=True)
    assert not fully_scored(Dataset.from_list([row([[0], [1], *pairs])]), any_length=True)
