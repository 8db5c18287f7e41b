"""Pools against a brute-force reference, and what must never be in them."""

import json
import sys
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lever_grpo.data import BeamDataError, load_sample
from lever_grpo.search import samplers
from lever_grpo.search.samplers import PoolSampler, sample_pools


ROWS = 60
MIX = {"text_sim": 0.5, "image_sim": 0.25, "random": 0.25}


def unit(rows=ROWS, width=8, seed=0, dtype=np.float32):
    points = np.random.default_rng(seed).normal(size=(rows, width))
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(dtype)


TEXT, IMAGE = unit(seed=1), unit(seed=2, width=5, dtype=np.float16)
OPTIONS = {
    "random": {},
    "text_sim": {"text": TEXT},
    "image_sim": {"image": IMAGE},
    "mix": {"text": TEXT, "image": IMAGE, "ratios": MIX},
}


def brute_force(features, query, candidates, size, entities=None):
    entities = entities or {}
    about = entities.get(query)
    open_to = [c for c in candidates if c != query and (about is None or entities.get(c) != about)]
    points = features.astype(np.float64)
    return sorted(open_to, key=lambda c: (-float((points[c] * points[query]).sum()), c))[:size]


@pytest.mark.parametrize("method", OPTIONS)
def test_pools_are_sets_of_candidates_without_the_query_or_its_entity(method):
    entities = {row: f"thing {row // 3}" for row in range(ROWS - 6)}  # six rows are about nothing
    queries, candidates = list(range(ROWS)), list(range(0, ROWS, 2))
    pools = sample_pools(method, queries, candidates, 9, entities=entities, **OPTIONS[method])
    for query, pool in zip(queries, pools, strict=True):
        assert len(pool) == len(set(pool)) == 9 and set(pool) <= set(candidates) - {query}
        assert all(entities.get(row) != entities.get(query, "none") for row in pool)


@pytest.mark.parametrize("method", OPTIONS)
def test_pools_do_not_depend_on_how_queries_are_divided_nor_on_the_order_of_candidates(method):
    queries, candidates = list(range(0, ROWS, 2)), list(range(ROWS))
    pools = sample_pools(method, queries, candidates, 12, seed=3, **OPTIONS[method])
    apart = [sample_pools(method, [query], candidates[::-1], 12, seed=3, **OPTIONS[method])[0] for query in queries]
    assert apart == pools
    assert sample_pools(method, queries[::-1], candidates, 12, seed=3, **OPTIONS[method]) == pools[::-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.booleans(), st.booleans())
def test_nearest_are_those_of_brute_force(seed, size, ties, about):
    rng = np.random.default_rng(seed)
    features = unit(40, 6, seed)
    if ties:  # whole groups of equal rows, as questions about one image have
        features = features[rng.integers(0, 4, 40)]
    entities = {row: str(rng.integers(0, 8)) for row in range(40)} if about else None
    queries, candidates = rng.permutation(40)[:5].tolist(), rng.permutation(40)[:32].tolist()
    expected = [brute_force(features, query, candidates, size, entities) for query in queries]
    assert sample_pools("image_sim", queries, candidates, size, image=features, entities=entities) == expected


def test_blocks_do_not_change_pools(monkeypatch):
    queries = list(range(ROWS))
    pools = sample_pools("text_sim", queries, queries, 7, text=TEXT)
    monkeypatch.setattr(samplers, "_BLOCK", 7 * ROWS + 3)
    assert sample_pools("text_sim", queries, queries, 7, text=TEXT) == pools


def test_rounding_of_the_matrix_product_does_not_decide():
    # all products agree to seven digits, which float32 cannot tell apart in a product of long rows
    rng = np.random.default_rng(0)
    features = (100 + 1e-4 * rng.normal(size=(50, 512))).astype(np.float32)
    pools = sample_pools("text_sim", [0, 1, 2], range(50), 10, text=features)
    assert pools == [brute_force(features, query, range(50), 10) for query in (0, 1, 2)]


def test_random_pools_are_uniform_and_seeded():
    queries, candidates = list(range(3000)), list(range(5000, 5012))
    pools = sample_pools("random", queries, candidates, 4, seed=1)
    first, anywhere = Counter(pool[0] for pool in pools), Counter(c for pool in pools for c in pool)
    assert chisquare([first[c] for c in candidates]).pvalue > 1e-3
    assert chisquare([anywhere[c] for c in candidates]).pvalue > 1e-3
    assert sample_pools("random", queries, candidates, 4, seed=1) == pools
    others = sample_pools("random", queries, candidates, 4, seed=2)
    assert np.mean([a == b for a, b in zip(pools, others, strict=True)]) < 0.01


def test_all_that_is_left_can_be_the_pool():
    for method, options in OPTIONS.items():
        (pool,) = sample_pools(method, [3], range(10), 8, entities={3: "x", 5: "x"}, **options)
        assert sorted(pool) == [0, 1, 2, 4, 6, 7, 8, 9], method


# ---------------------------------------------------------------- mix


def test_mix_fills_its_shares_in_order_without_repeats():
    for query in range(ROWS):
        (pool,) = sample_pools("mix", [query], range(ROWS), 8, text=TEXT, image=IMAGE, ratios=MIX)
        text = brute_force(TEXT, query, range(ROWS), 4)
        assert pool[:4] == text
        image = [row for row in brute_force(IMAGE, query, range(ROWS), 6) if row not in text]
        assert pool[4:6] == image[:2]
        assert len(set(pool)) == 8


def test_mix_is_topped_up_at_random():
    options = {"text": TEXT, "seed": 5}
    queries = list(range(ROWS))
    pools = sample_pools("mix", queries, queries, 10, ratios={"text_sim": 0.25}, **options)
    nearest = [brute_force(TEXT, query, queries, 2) for query in queries]  # 2.5 is rounded to the even number
    assert [pool[:2] for pool in pools] == nearest
    rest = Counter(row for pool in pools for row in pool[2:])
    assert len(rest) > 0.9 * ROWS
    assert sample_pools("mix", [4], queries, 3, ratios={"text_sim": 1.0}, text=TEXT) == [
        brute_force(TEXT, 4, queries, 3)
    ]


def test_random_share_in_front_and_top_up_differ():
    (pool,) = sample_pools("mix", [0], range(ROWS), 20, ratios={"random": 0.5})
    assert len(set(pool)) == 20


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("nearest", {}, ValueError, "'mix'.*got 'nearest'"),
        ("random", {"pool_size": 0}, ValueError, "pool_size must be at least 1.*got 0"),
        ("random", {"seed": -1}, ValueError, "seed not negative.*-1"),
        ("random", {"ratios": MIX}, ValueError, "ratios belong to method='mix'"),
        ("mix", {}, ValueError, "ratios belong to method='mix'"),
        ("mix", {"ratios": {"near": 0.5}}, ValueError, "near"),
        ("mix", {"ratios": {"random": -0.5}}, ValueError, "not negative"),
        ("mix", {"ratios": {"random": 0.6, "text_sim": 0.5}, "text": TEXT}, ValueError, "at most 1 together"),
        ("mix", {"ratios": {}}, ValueError, "shares"),
        ("mix", {"ratios": {"text_sim": float("nan")}, "text": TEXT}, ValueError, "shares"),
        ("text_sim", {"image": IMAGE}, ValueError, "'text_sim' needs embeddings: pass text="),
        ("image_sim", {"image": np.ones(5)}, ValueError, r"image must be floats.*shape \(5,\)"),
        ("text_sim", {"text": TEXT[:15]}, BeamDataError, "row ids from 0 to 14, found 15, 16, 17, 18, 19"),
        ("text_sim", {"text": np.where(np.arange(ROWS) == 3, np.nan, 1.0)[:, None]}, BeamDataError, "1 rows: 3"),
        ("random", {"candidate_ids": [1, 2, 3, 2]}, BeamDataError, "each id once, found 2"),
        ("random", {"candidate_ids": [1.5, 2.0]}, ValueError, r"candidate_ids.*\[1.5, 2.0\]"),
        ("random", {"query_ids": [-4]}, ValueError, r"query_ids.*\[-4\]"),
    ],
)
def test_bad_arguments(method, options, error, message):
    arguments = {"query_ids": [0, 1], "candidate_ids": list(range(20)), "pool_size": 4, **options}
    with pytest.raises(error, match=message):
        sample_pools(method, **arguments)


@pytest.mark.parametrize("method", OPTIONS)
def test_too_few_candidates(method):
    entities = {1: "x", 3: "x", 4: "x"}
    message = r"2 of 3 queries have fewer candidates than pool_size=4: 1, 3; query 1 has 2 of 5"
    with pytest.raises(BeamDataError, match=message):
        sample_pools(method, [1, 3, 9], [0, 1, 2, 3, 4], 4, entities=entities, **OPTIONS[method])


@pytest.mark.parametrize("method", OPTIONS)
def test_too_few_candidates_may_be_an_empty_pool(method, tmp_path, caplog):
    entities = dict.fromkeys((1, 3, 4, 7), "x")
    queries, candidates = [1, 9, 3, 12], [0, 1, 2, 3, 4, 5, 6]
    options = {"entities": entities, "cache_dir": tmp_path, "allow_empty": True, **OPTIONS[method]}
    pools = sample_pools(method, queries, candidates, 5, **options)
    assert "2 of 4 queries have fewer candidates than pool_size=5: 1, 3; query 1 has 4 of 7" in caplog.text
    enough = sample_pools(method, [9, 12], candidates, 5, entities=entities, **OPTIONS[method])
    assert pools == [[], enough[0], [], enough[1]]
    assert sample_pools(method, queries, candidates, 5, **options) == pools  # as the cache has them
    with pytest.raises(BeamDataError, match="2 of 2 queries have fewer candidates"):
        sample_pools(method, [1, 3], candidates, 5, **options)


def test_no_queries_give_no_pools():
    assert sample_pools("text_sim", [], range(5), 2, text=TEXT) == []


# ---------------------------------------------------------------- the index


def test_many_candidates_need_usearch(monkeypatch):
    monkeypatch.setattr(samplers, "EXACT_LIMIT", 10)
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(ImportError, match=r"60 candidates.*lever_grpo\[search\]"):
        sample_pools("text_sim", [1], range(ROWS), 4, text=TEXT)
    assert len(sample_pools("random", [1], range(ROWS), 4)[0]) == 4  # no neighbours, no index


def test_index_finds_nearly_the_same(monkeypatch):
    pytest.importorskip("usearch.index")
    features = unit(2000, 16)
    entities = {row: str(row % 300) for row in range(1500)}
    queries, candidates = list(range(0, 2000, 10)), list(range(2000))
    exact = sample_pools("text_sim", queries, candidates, 20, text=features, entities=entities)
    monkeypatch.setattr(samplers, "EXACT_LIMIT", 1000)
    found = sample_pools("text_sim", queries, candidates, 20, text=features, entities=entities)
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(exact, found, strict=True)]) > 0.97
    for query, pool in zip(queries, found, strict=True):
        assert pool == brute_force(features, query, pool, 20, entities)  # in order, without the query's entity
    apart = [sample_pools("text_sim", [q], candidates, 20, text=features, entities=entities)[0] for q in queries[:3]]
    assert apart == found[:3]


class ShortSighted:
    """An index that finds the three first points only."""

    def __init__(self, **_):
        self.keys = np.arange(3)

    def add(self, keys, rows, threads):
        assert threads == 1 and len(keys) == len(rows)

    def search(self, side, count, threads):
        return self


def test_what_the_index_does_not_find_is_searched_for(monkeypatch):
    module = type(sys)("usearch.index")
    module.Index = ShortSighted
    monkeypatch.setitem(sys.modules, "usearch", type(sys)("usearch"))
    monkeypatch.setitem(sys.modules, "usearch.index", module)
    exact = sample_pools("text_sim", [0, 30], range(ROWS), 5, text=TEXT)
    few = sample_pools("text_sim", [30], range(ROWS), 2, text=TEXT)
    monkeypatch.setattr(samplers, "EXACT_LIMIT", 10)
    assert sample_pools("text_sim", [0, 30], range(ROWS), 5, text=TEXT) == exact
    # with enough found, its answer is taken: this is the index at work
    assert set(sample_pools("text_sim", [30], range(ROWS), 2, text=TEXT)[0]) < {0, 1, 2} and not set(few[0]) < {
        0,
        1,
        2,
    }


# ---------------------------------------------------------------- candidates that are kept


@pytest.mark.parametrize("method", OPTIONS)
def test_kept_candidates_give_the_same_pools(method):
    entities = {row: f"thing {row // 3}" for row in range(ROWS - 6)}
    candidates, options = range(0, ROWS, 2), {**OPTIONS[method]}
    tables = {name: options.pop(name) for name in ("text", "image") if name in options}
    sampler = PoolSampler(candidates, entities=entities, **{name: table[::2] for name, table in tables.items()})
    for queries, size in ([3, 8], 5), ([8], 9), ([59, 0, 3], 2):
        rows = {name: table[queries] for name, table in tables.items()}
        expected = sample_pools(method, queries, candidates, size, entities=entities, **OPTIONS[method])
        assert sampler.pools(method, queries, size, **options, **rows) == expected


def test_queries_that_are_in_no_table():
    sampler = PoolSampler(range(ROWS), text=TEXT, entities={4: "a", 5: "a"})
    left_out = [np.array(out, np.int64) for out in ([], [4, 5], [4, 5])]
    pools = sampler.pools("text_sim", [900, 901, 5], 3, text=TEXT[[4, 4, 5]], left_out=left_out)
    nearest = brute_force(np.concatenate([TEXT, TEXT[4:5]]), ROWS, range(ROWS), 5)
    assert nearest[0] == 4 and pools[0] == nearest[:3]
    assert pools[1] == [row for row in nearest if row not in (4, 5)][:3]
    assert pools[2] == brute_force(TEXT, 5, range(ROWS), 3, {4: "a", 5: "a"})


def test_the_index_of_kept_candidates_is_built_once(monkeypatch):
    built = []

    class Counted(ShortSighted):
        def add(self, keys, rows, threads):
            built.append(len(keys))

    module = type(sys)("usearch.index")
    module.Index = Counted
    monkeypatch.setitem(sys.modules, "usearch", type(sys)("usearch"))
    monkeypatch.setitem(sys.modules, "usearch.index", module)
    monkeypatch.setattr(samplers, "EXACT_LIMIT", 10)
    sampler = PoolSampler(range(ROWS), text=TEXT)
    sampler.pools("random", [1], 4)
    assert not built  # not before it is needed
    for size in (2, 5, 2):
        sampler.pools("text_sim", [1, 2], size, text=TEXT[[1, 2]])
    assert built == [ROWS]


def test_rows_of_kept_candidates_are_checked_when_they_are_needed():
    with pytest.raises(BeamDataError, match="ascending ids, each id once, found 1"):
        PoolSampler([2, 1])
    holed = np.where(np.arange(ROWS) == 3, np.nan, TEXT.T).T
    sampler = PoolSampler(range(ROWS), text=TEXT[1:], image=holed)
    assert len(sampler.pools("random", [1], 4)[0]) == 4
    with pytest.raises(BeamDataError, match="text: expected a row for each of 60 ids, found 59"):
        sampler.pools("text_sim", [1], 4, text=TEXT[[1]])
    with pytest.raises(BeamDataError, match="image: expected finite numbers.* 1 rows: 3"):
        sampler.pools("image_sim", [1], 4, image=TEXT[[1]])
    with pytest.raises(BeamDataError, match="text: expected finite numbers.* 1 rows: 7"):
        PoolSampler(range(ROWS), text=TEXT).pools("text_sim", [7], 4, text=holed[[3]])


# ---------------------------------------------------------------- the cache


def test_cache_is_read_for_the_same_content_only(tmp_path, monkeypatch):
    arguments = {"query_ids": [0, 1, 2], "candidate_ids": list(range(30)), "pool_size": 5, "cache_dir": tmp_path}
    pools = sample_pools("text_sim", text=TEXT, **arguments)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps([pool[::-1] for pool in pools]))  # to see whether it is read
    assert sample_pools("text_sim", text=TEXT.copy(), **arguments) == [pool[::-1] for pool in pools]
    elsewhere = TEXT.copy()
    elsewhere[40] = 0.0  # the row of nobody here
    assert sample_pools("text_sim", text=elsewhere, **arguments) == [pool[::-1] for pool in pools]
    assert sample_pools("text_sim", text=TEXT, **{**arguments, "cache_dir": None}) == pools
    edited = TEXT.copy()
    edited[29] *= 0.5
    changes = [
        {"text": edited},
        {"text": TEXT.astype(np.float64)},
        {"seed": 1},
        {"pool_size": 6},
        {"query_ids": [0, 1, 3]},
        {"candidate_ids": list(range(29))},
        {"entities": {0: "a", 7: "a"}},
    ]
    for n, change in enumerate(changes, start=2):
        expected = sample_pools("text_sim", **{"text": TEXT, **arguments, **change, "cache_dir": None})
        assert sample_pools("text_sim", **{"text": TEXT, **arguments, **change}) == expected
        assert len(list(tmp_path.iterdir())) == n, change
    for ratios in ({"text_sim": 0.4}, {"text_sim": 0.6}, {"text_sim": 0.4, "random": 0.6}):
        sample_pools("mix", text=TEXT, ratios=ratios, **arguments)
    assert len(list(tmp_path.iterdir())) == len(changes) + 4


def test_a_damaged_cache_is_named(tmp_path):
    arguments = ("random", [0, 1], list(range(30)), 5)
    sample_pools(*arguments, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    for content, message in (("[[1, 2", "invalid JSON"), ("[[1, 2, 3, 4, 5]]", "expected 2 pools of 5")):
        file.write_text(content)
        with pytest.raises(BeamDataError, match=f"{file.name}.*{message}.*delete it"):
            sample_pools(*arguments, cache_dir=tmp_path)


# ---------------------------------------------------------------- a search that was done elsewhere


@pytest.mark.parametrize("task", ["emoji", "country_facts"])
def test_nearest_halves_of_the_packaged_pools(task):
    sample = load_sample(task)
    logs = [pq.read_table(path, columns=["query_id", "candidate_ids"]).to_pylist() for path in sample.splits.values()]
    candidates = sorted({i for log in logs for row in log for i in row["candidate_ids"]})
    (feature,) = sample.similarity_features
    heldout = logs[-1]
    queries = [row["query_id"] for row in heldout]
    pools = sample_pools("text_sim", queries, candidates, 8, text=sample.store[feature], entities=sample.entities())
    assert [set(pool) for pool in pools] == [set(row["candidate_ids"][:8]) for row in heldout]
