"""The search against brute force, and what it does with a model that fails."""

import itertools
import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_grpo.data import Example, inspect_log, load_beams, to_prompt_order
from lever_grpo.scorers import ScorerError
from lever_grpo.search import SearchConfig, beam_search


ROWS = [Example(i, f"question {i}", (f"answer {i}",)) for i in range(40)]


def known(query: int, prompt_order: tuple[int, ...], levels: int = 10**6) -> list[float]:
    """Log-probabilities of two tokens: a function of the prompt. Few `levels` make ties."""
    digest = zlib.crc32(repr((query, prompt_order)).encode())
    return [-0.1 - (digest % levels) / levels, -0.1 - (digest // 7 % levels) / levels]


class Known:
    def __init__(self, levels=10**6, bad=None):
        self.levels, self.bad, self.calls = levels, bad or {}, []

    def score(self, prompts):
        self.calls.append(prompts)
        asked = [(p.query.id, tuple(d.id for d in p.demonstrations)) for p in prompts]
        results = []
        for query, shown in asked:
            value = self.bad.get((query, shown), self.bad.get(query, known(query, shown, self.levels)))
            if isinstance(value, Exception):
                raise value
            results.append(None if value is None else np.array(value))
        return results

    def answer(self, prompts, max_new_tokens=10):
        return [p.demonstrations[0].answers[0] if p.demonstrations[0].id % 3 else None for p in prompts]


def brute_force(query, pool, config, levels):
    """Survivors and everything scored, from the definition: `{row ids in search order: mean log-prob}`."""
    mean = {}

    def value(ids):
        order = tuple(to_prompt_order(ids, config.construct_order))
        mean[ids] = sum(known(query, order, levels)) / 2
        return mean[ids]

    value(())
    beams = [()]
    for _ in range(config.num_shots):
        found = []
        for beam, candidate in itertools.product(beams, pool):
            new = (*beam, candidate)
            if candidate in beam or config.unordered and any(set(new) == set(other) for other in found):
                continue
            value(new)
            found.append(new)
        found.sort(key=lambda ids: -over(config.score, mean[ids], mean[()]))
        beams = found[: config.beam_size]
    return beams, mean


def over(score, new, old):
    return {"log_prob": new, "logprob_gain": new - old, "infoscore": math.exp(new) - math.exp(old)}[score]


def ids_of(record, sequence):
    return tuple(record["candidate_ids"][p] for p in sequence)


def load(records, tmp_path, name="log.jsonl", **options):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_beams(path, cache_dir=str(tmp_path / "cache"), **options)


@settings(max_examples=150, deadline=None)
@given(
    pool_size=st.integers(1, 7),
    shots=st.integers(1, 4),
    beam_size=st.integers(1, 6),
    score=st.sampled_from(["infoscore", "logprob_gain", "log_prob"]),
    construct_order=st.sampled_from(["left", "right"]),
    unordered=st.booleans(),
    levels=st.sampled_from([3, 10**6]),
)
def test_equals_brute_force(pool_size, shots, beam_size, score, construct_order, unordered, levels):
    config = SearchConfig(shots, beam_size, score, construct_order, unordered)
    pool = ROWS[10 : 10 + pool_size]
    records, failures = beam_search(Known(levels), ROWS[:1], [pool], config)
    if pool_size < shots:
        assert not records
        assert failures == [
            {
                "query_id": 0, "kind": "pool", "reason": f"a pool of {pool_size} is too small for {shots} shots",
                "sequences": [], "skipped": True,
            }
        ]  # fmt: skip
        return
    (record,) = records
    beams, mean = brute_force(0, [row.id for row in pool], config, levels)
    assert not failures
    sequences = [ids_of(record, sequence) for sequence in record["sequences"]]
    assert sorted(sequences) == sorted(ids for ids in mean if ids) and len(set(sequences)) == len(sequences)
    survivors = [ids for ids, survived in zip(sequences, record["survived"], strict=True) if survived]
    assert sorted(survivors) == sorted(beams)
    assert record["zero_shot"] == (mean[()] if score == "log_prob" else 0.0)
    for i, ids in enumerate(sequences):
        assert record["columns"]["log_prob"][i] == pytest.approx(mean[ids], abs=1e-12)
        assert record["scores"][i] == pytest.approx(over(score, mean[ids], mean[()]), abs=1e-12)
        gains = [over(score, mean[ids[:t]], mean[ids[: t - 1]]) for t in range(1, len(ids) + 1)]
        assert record["shot_scores"][i] == ([] if score == "log_prob" else pytest.approx(gains, abs=1e-12))
        if gains and score != "log_prob":
            assert math.fsum(record["shot_scores"][i]) == pytest.approx(record["scores"][i], abs=1e-12)


@pytest.mark.parametrize("unordered", [False, True])
def test_a_batch_equals_its_queries_alone_in_one_call_a_step(unordered):
    config = SearchConfig(3, 4, unordered=unordered, random_sequences=5, similarity_sequences=2)
    queries, pools = ROWS[:5], [ROWS[10 + i : 16 + 2 * i] for i in range(5)]
    scorer = Known()
    together = beam_search(scorer, queries, pools, config)
    assert len(scorer.calls) == 5  # zero-shot, three steps, contrast
    assert [len(call) for call in scorer.calls[:2]] == [5, sum(map(len, pools))]
    alone = [beam_search(Known(), [q], [p], config)[0][0] for q, p in zip(queries, pools, strict=True)]
    assert together == (alone, [])


@pytest.mark.parametrize("order", ["left", "right"])
def test_where_a_new_demonstration_stands(order):
    scorer = Known()
    records, _ = beam_search(scorer, ROWS[:1], [ROWS[1:5]], SearchConfig(2, 2, construct_order=order))
    (query, shown) = scorer.calls[2][0].query, [d.id for d in scorer.calls[2][0].demonstrations]
    found_first, found_last = ids_of(records[0], records[0]["sequences"][4])
    assert shown == ([found_last, found_first] if order == "left" else [found_first, found_last])
    assert query is ROWS[0]


@pytest.mark.parametrize("score", ["infoscore", "logprob_gain", "log_prob"])
def test_the_log_is_read_back(tmp_path, score):
    config = SearchConfig(2, 3, score)
    records, _ = beam_search(Known(), ROWS[:9], [ROWS[10:18]] * 9, config)
    rows = load(records, tmp_path)
    for record, row in zip(records, rows, strict=True):
        for name in ("query_id", "candidate_ids", "sequences", "scores", "shot_scores", "survived", "zero_shot"):
            assert row[name] == record[name], name
        assert row["columns"] == record["columns"] and row["source"] == record["source"]
        assert sum(row["survived"]) == 3 and len(row["sequences"]) == 8 + 3 * 7
    pairs = inspect_log(load(records, tmp_path, shots=2))
    assert pairs.lengths == {2: 9 * 21} and pairs.survivors == 27 and pairs.sources == {"search": 9 * 21}
    assert pairs.warnings == []
    # gains of different lengths are told apart; absolute scores can be compared
    assert len(inspect_log(rows).warnings) == (score != "log_prob")
    assert inspect_log(load(records, tmp_path, score_column="log_prob", shots=2)).score["max"] < 0


# ---- contrast ----


def test_contrast_says_where_it_is_from(tmp_path):
    config = SearchConfig(3, 1, random_sequences=10, similarity_sequences=3, seed=5)
    proposals = {0: [[5, 4, 3], [5, 4, 3], [0, 1, 2]], 1: [[7, 0, 2]]}
    records, _ = beam_search(Known(), ROWS[:2], [ROWS[10:20]] * 2, config, proposals=proposals.__getitem__)
    for query, record in enumerate(records):
        source = {tuple(s): name for s, name in zip(record["sequences"], record["source"], strict=True)}
        assert len(source) == len(record["sequences"])
        for window in ((0, 1, 2), (1, 2, 3), (2, 3, 4)):
            assert source[window] in ("search", "similarity")
        for proposal in proposals[query]:
            assert source[tuple(proposal)] == ("similarity" if proposal == [0, 1, 2] else "selector")
        drawn = [s for s in source if source[s] == "random"]
        assert 8 <= len(drawn) <= 10 and {len(s) for s in drawn} == {3}
        survivors = [s for s, kept in zip(record["sequences"], record["survived"], strict=True) if kept]
        assert len(survivors) == 1 and source[tuple(survivors[0])] == "search"
        # the gains of a step are known only where its beginnings were scored
        for sequence, gains in zip(record["sequences"], record["shot_scores"], strict=True):
            assert bool(gains) == all(tuple(sequence[:t]) in source for t in range(1, len(sequence)))
    assert [[s for s, n in zip(r["sequences"], r["source"], strict=True) if n == "random"] for r in records][0] != []
    assert inspect_log(load(records, tmp_path, shots=3)).sources.keys() == {
        "search", "random", "similarity", "selector",
    }  # fmt: skip


def test_random_sequences_depend_on_seed_and_query_only():
    def drawn(seed, rows):
        config = SearchConfig(2, 1, random_sequences=30, seed=seed)
        records, _ = beam_search(Known(), rows, [ROWS[10:20]] * len(rows), config)
        return {r["query_id"]: [s for s, n in zip(r["sequences"], r["source"], strict=True) if n == "random"]
                for r in records}  # fmt: skip

    both = drawn(0, ROWS[:2])
    assert drawn(0, ROWS[1:2]) == {1: both[1]} and both[0] != both[1] and drawn(1, ROWS[:1]) != {0: both[0]}
    # more than there are: all of them
    assert (
        len(beam_search(Known(), ROWS[:1], [ROWS[1:5]], SearchConfig(2, 1, random_sequences=99))[0][0]["scores"]) == 16
    )


@pytest.mark.parametrize("proposal", [[0], [0, 0], [0, 10], [-1, 2], [0, 1, 2]])
def test_wrong_proposals(proposal):
    with pytest.raises(ValueError, match=r"query 0: proposal .*expected 2 different positions"):
        beam_search(Known(), ROWS[:1], [ROWS[10:20]], SearchConfig(2), proposals=lambda query: [proposal])


def test_judging():
    rows = [Example(0, "?", ("answer 11", "answer 12"))]
    for judge in ("survivors", "all"):
        records, _ = beam_search(Known(), rows, [ROWS[10:16]], SearchConfig(2, 3, judge=judge))
        for sequence, survived, correct in zip(
            records[0]["sequences"], records[0]["survived"], records[0]["columns"]["correct"], strict=True
        ):
            first = 10 + sequence[-1]  # left: found last, stands first
            asked = (survived or judge == "all") and first % 3
            assert correct == (float(first in (11, 12)) if asked else None)
    assert "correct" not in beam_search(Known(), rows, [ROWS[10:16]], SearchConfig(2))[0][0]["columns"]


# ---- what fails ----


@pytest.mark.parametrize(
    "value, reason",
    [
        (None, "could not be asked"),
        ([math.nan, -1.0], "NaN or infinite"),
        ([-math.inf], "NaN or infinite"),
        ([math.inf], "NaN or infinite"),
        ([], "no tokens"),
        ([800.0], "above 0"),
    ],
)
def test_what_has_no_score_is_reported_and_never_logged(tmp_path, value, reason):
    config = SearchConfig(2, 2, random_sequences=4)
    fine = beam_search(Known(), ROWS[:3], [ROWS[10:16]] * 3, config)[0]
    best = ids_of(fine[0], fine[0]["sequences"][fine[0]["survived"].index(True)])
    bad = {(0, (12,)): value, (0, tuple(to_prompt_order(best))): value, (1, ()): value, 2: value}
    records, failures = beam_search(Known(bad=bad), ROWS[:4], [ROWS[10:16]] * 4, config)
    assert [record["query_id"] for record in records] == [0, 3]
    assert [(f["query_id"], f["skipped"], f["kind"]) for f in failures] == [
        (0, False, "value"), (1, True, "value"), (2, True, "value"),
    ]  # fmt: skip
    assert all(reason in failure["reason"] for failure in failures) and "zero-shot" in failures[1]["reason"]
    assert [12] in failures[0]["sequences"]
    logged = [ids_of(records[0], sequence) for sequence in records[0]["sequences"]]
    assert (12,) not in logged and best not in logged
    rows = load(records, tmp_path)
    assert all(math.isfinite(score) for row in rows for score in row["scores"])
    assert rows[0]["notes"]["failed"] == len(failures[0]["sequences"])


def test_a_step_without_any_score_skips_the_query():
    pairs = {(0, pair): None for pair in itertools.permutations(range(10, 14), 2)}
    records, failures = beam_search(Known(bad=pairs), ROWS[:1], [ROWS[10:14]], SearchConfig(2, 2))
    assert not records
    assert failures[0]["skipped"] and "no usable score of any of the 6 sequences of 2 shots" in failures[0]["reason"]


def test_only_the_query_that_breaks_the_scorer_is_lost(caplog):
    bad = {(2, (11,)): ScorerError("query 2: the server went away")}
    config = SearchConfig(2, 2)
    records, failures = beam_search(Known(bad=bad), ROWS[:4], [ROWS[10:14]] * 4, config)
    assert records == beam_search(Known(), [ROWS[i] for i in (0, 1, 3)], [ROWS[10:14]] * 3, config)[0]
    assert failures == [
        {
            "query_id": 2, "kind": "scorer", "reason": "query 2: the server went away", "sequences": [],
            "skipped": True,
        }
    ]  # fmt: skip
    assert "the server went away" in caplog.text


def test_a_scorer_that_miscounts_is_an_error():
    class Short(Known):
        def score(self, prompts):
            return super().score(prompts)[1:]

    with pytest.raises(ValueError, match="0 results for 1 prompts"):
        beam_search(Short(), ROWS[:1], [ROWS[10:14]], SearchConfig())


@pytest.mark.parametrize(
    "queries, pools, message",
    [
        (ROWS[:1], [ROWS[:3]], "query 0 is in its own pool"),
        (ROWS[:1], [[ROWS[3], ROWS[4], ROWS[3]]], "holds a candidate twice"),
        ([ROWS[0], ROWS[0]], [ROWS[3:6]] * 2, "there twice"),
        (ROWS[:2], [ROWS[3:6]], "2 queries and 1 pools"),
    ],
)
def test_wrong_pools(queries, pools, message):
    with pytest.raises(ValueError, match=message):
        beam_search(Known(), queries, pools, SearchConfig())


@pytest.mark.parametrize(
    "options",
    [{"num_shots": 0}, {"num_shots": 9}, {"beam_size": 0}, {"score": "info"}, {"construct_order": "up"},
     {"judge": "some"}, {"judge_by": "bleu"}, {"random_sequences": -1}, {"seed": -1}],
)  # fmt: skip
def test_wrong_settings(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        SearchConfig(**options)


def test_nothing_to_search():
    assert beam_search(Known(), [], [], SearchConfig()) == ([], [])
    records, failures = beam_search(Known(), ROWS[:1], [[]], SearchConfig())
    assert not records and failures[0]["reason"] == "a pool of 0 is too small for 2 shots"
