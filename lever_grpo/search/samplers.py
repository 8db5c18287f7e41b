"""The pool of each query: which candidates a search may put in its prompt.

A pool depends on the query, the candidates and the seed only, so that queries can be divided over processes at will.
Nearest neighbours are exact up to `EXACT_LIMIT` candidates; above it they come from an HNSW index (`usearch`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..atomic import atomic_file
from ..data.records import BeamDataError


logger = logging.getLogger(__name__)

METHODS = ("random", "text_sim", "image_sim")
EXACT_LIMIT = 100_000  # candidates
_BLOCK = 1 << 24  # similarities at a time: 64 MB
_NOBODY = np.empty(0, np.int64)
_VERSION = 1  # of the pools that stand in caches: raise it when the same inputs give other pools


def sample_pools(
    method: str,
    query_ids: Sequence[int],
    candidate_ids: Sequence[int],
    pool_size: int,
    *,
    seed: int = 0,
    text: NDArray | None = None,
    image: NDArray | None = None,
    ratios: Mapping[str, float] | None = None,
    entities: Mapping[int, str] | None = None,
    allow_empty: bool = False,
    cache_dir: str | os.PathLike | None = None,
) -> list[list[int]]:
    """
    Chooses the candidates of each query.

    Args:
        method (`str`):
            How candidates are chosen:

            * `"random"`: at random;
            * `"text_sim"`, `"image_sim"`: those with the largest inner product of `text` or `image` rows, nearest
              first; of equally near ones, those with the smaller id;
            * `"mix"`: by `ratios`.
        query_ids, candidate_ids (`list[int]`):
            Row ids. A query never is in its own pool, and may be a candidate of others. The order of the candidates
            does not matter.
        pool_size (`int`):
            Number of candidates of every query.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random choices. Each query has its own generator, seeded by this number and its id.
        text, image (`np.ndarray`, *optional*):
            Embeddings of shape (N, width), one row a row id (`store["question"]` of an [`EmbeddingStore`]). With rows
            of unit length the inner product is the cosine.
        ratios (`dict[str, float]`, *optional*):
            For `"mix"`: share of the pool by method, filled in this order with candidates that are not in it yet. What
            the shares leave of 1 is filled at random.
        entities (`dict[int, str]`, *optional*):
            What rows are about: a query's pool has no row about the same thing as the query.
        allow_empty (`bool`, *optional*, defaults to `False`):
            Whether a query with fewer candidates than `pool_size` gets an empty pool, and a warning, instead of an
            error. If all queries have fewer, it is an error still.
        cache_dir (`str` or `Path`, *optional*):
            Folder that keeps the pools under a fingerprint of everything they depend on, to be read the next time.

    Returns:
        `list[list[int]]`: Candidate ids of each query.

    Raises:
        ValueError: an option is out of range, or embeddings that the method needs are not given.
        [`BeamDataError`]: a query has fewer candidates than `pool_size`, an id is there twice or has no embedding, or
            an embedding is not finite.
        ImportError: there are more than `EXACT_LIMIT` candidates and `usearch` is not installed.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.search.samplers import sample_pools
    >>> points = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]])
    >>> sample_pools("text_sim", [0, 2], [0, 1, 2, 3], 2, text=points)
    [[1, 3], [3, 1]]
    >>> sample_pools("text_sim", [0], [0, 1, 2, 3], 2, text=points, entities={0: "a", 1: "a"})
    [[3, 2]]

    ```
    """
    shares = checked_shares(method, ratios, pool_size, seed)
    queries, candidates = _ids("query_ids", query_ids), np.sort(_ids("candidate_ids", candidate_ids))

    def rows_of(ids: NDArray[np.int64]) -> dict[str, Any]:
        tables = (("text", text), ("image", image))
        return {name: _rows_of(name, table, ids) for name, table in tables if f"{name}_sim" in shares}

    return PoolSampler(candidates, entities=entities, **rows_of(candidates)).pools(
        method,
        queries,
        pool_size,
        seed=seed,
        ratios=ratios,
        allow_empty=allow_empty,
        cache_dir=cache_dir,
        **rows_of(queries),
    )


class PoolSampler:
    """
    [`sample_pools`] for candidates that are asked for again and again: what depends on them alone (the checks of their
    rows, the index of many) is computed when it is first needed, and kept.

    Args:
        candidate_ids (`list[int]`):
            Row ids, ascending.
        text, image (`np.ndarray`, *optional*):
            Embeddings of the candidates, (C, width), in their order.
        entities (`dict[int, str]`, *optional*):
            What rows are about, by row id.

    Raises:
        ValueError: `candidate_ids` are no row ids.
        [`BeamDataError`]: they do not ascend, or an id is there twice.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.search.samplers import PoolSampler
    >>> sampler = PoolSampler(range(4), text=np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.2]]))
    >>> sampler.pools("text_sim", [9], 2, text=np.array([[0.1, 1.0]]))
    [[2, 3]]
    >>> sampler.pools("text_sim", [2], 2, text=np.array([[0.1, 1.0]]))  # the query is a candidate
    [[3, 1]]

    ```
    """

    def __init__(
        self,
        candidate_ids: Sequence[int] | NDArray[np.int64],
        *,
        text: NDArray | None = None,
        image: NDArray | None = None,
        entities: Mapping[int, str] | None = None,
    ):
        self.ids = _ids("candidate_ids", candidate_ids)
        wrong = self.ids[1:][self.ids[1:] <= self.ids[:-1]]
        if len(wrong):
            raise BeamDataError(f"candidate_ids: expected ascending ids, each id once, found {_some(wrong)} too late")
        self._rows = {"text_sim": text, "image_sim": image}
        self._neighbours: dict[str, _Neighbours] = {}
        self._entities = entities or {}
        about = defaultdict(list)
        for position, candidate in enumerate(self.ids.tolist() if self._entities else ()):
            if self._entities.get(candidate) is not None:
                about[self._entities[candidate]].append(position)
        self._about = {entity: np.array(positions) for entity, positions in about.items()}

    def pools(
        self,
        method: str,
        query_ids: Sequence[int] | NDArray[np.int64],
        pool_size: int,
        *,
        seed: int = 0,
        text: NDArray | None = None,
        image: NDArray | None = None,
        ratios: Mapping[str, float] | None = None,
        left_out: list[NDArray[np.int64]] | None = None,
        allow_empty: bool = False,
        cache_dir: str | os.PathLike | None = None,
    ) -> list[list[int]]:
        """
        Chooses the candidates of each query.

        Args:
            query_ids (`list[int]`):
                Row ids; that of the candidate, if a query is one. With `left_out` they say only what each query's
                generator is seeded by.
            text, image (`np.ndarray`, *optional*):
                Embeddings of the queries, (Q, width), in their order.
            left_out (`list[np.ndarray]`, *optional*):
                For each query the positions of the candidates that its pool must not have, ascending; by default that
                of the query itself, and those of its entity.
            method, pool_size, seed, ratios, allow_empty, cache_dir:
                As in [`sample_pools`], as are the errors.

        Returns:
            `list[list[int]]`: Candidate ids of each query.
        """
        shares = checked_shares(method, ratios, pool_size, seed)
        queries = _ids("query_ids", query_ids)
        sides = {name: {"text_sim": text, "image_sim": image}[name] for name in shares if name != "random"}
        neighbours = {name: self._neighbours_by(name) for name in sides}
        asked = {name: _checked(name.removesuffix("_sim"), rows, queries) for name, rows in sides.items()}
        hidden = self._left_out(queries) if left_out is None else left_out
        short = _short(queries, self.ids, hidden, pool_size, allow_empty)
        queries, hidden = queries[~short], [out for out, few in zip(hidden, short, strict=True) if not few]
        asked = {name: rows[~short] for name, rows in asked.items()}
        path = None
        if cache_dir is not None:
            about = (method, shares, pool_size, seed, len(self.ids) > EXACT_LIMIT)
            features = {name: (rows, neighbours[name].given) for name, rows in asked.items()}
            path = Path(cache_dir, f"pools-{_fingerprint(about, queries, self.ids, hidden, features)}.json")
        if path is not None and path.exists():
            pools = _read_pools(path, len(queries), pool_size)
        else:
            rankings = {name: neighbours[name].nearest(rows, hidden, pool_size) for name, rows in asked.items()}
            pools = _choose(shares, rankings, queries, self.ids, hidden, pool_size, seed)
            if path is not None:
                with atomic_file(path) as stream:
                    stream.write(json.dumps(pools).encode())
        for position in np.flatnonzero(short).tolist():
            pools.insert(position, [])
        return pools

    def _left_out(self, queries: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """For each query the positions of candidates that its pool must not have: itself, and rows of its entity."""
        result = []
        for query, position in zip(queries.tolist(), np.searchsorted(self.ids, queries).tolist(), strict=True):
            entity = self._entities.get(query)
            out = _NOBODY if entity is None else self._about.get(entity, _NOBODY)
            itself = self.ids[position : position + 1] == query  # one row, or none behind the last
            result.append(np.union1d(out, position) if itself.any() else out)
        return result

    def _neighbours_by(self, method: str) -> _Neighbours:
        if method not in self._neighbours:
            rows = _checked(method.removesuffix("_sim"), self._rows[method], self.ids)
            self._neighbours[method] = _Neighbours(rows)
        return self._neighbours[method]


def parse_ratios(ratios: Sequence[str] | None) -> dict[str, float] | None:
    """
    Shares as they are written on a command line.

    Raises:
        ValueError: if one is not `method=share`.

    Example:

    ```python
    >>> from lever_grpo.search.samplers import parse_ratios
    >>> parse_ratios(["text_sim=0.5", "image_sim=0.25"])
    {'text_sim': 0.5, 'image_sim': 0.25}

    ```
    """
    if ratios is None:
        return None
    try:
        return {name: float(share) for name, share in (ratio.split("=") for ratio in ratios)}
    except ValueError as error:
        raise ValueError(f"ratios={ratios}: expected method=share, as text_sim=0.5.") from error


def checked_shares(method: str, ratios: Mapping[str, float] | None, pool_size: int, seed: int) -> dict[str, float]:
    """
    Share of the pool by method, of options as [`sample_pools`] takes them.

    Raises:
        ValueError: if an option is out of range.

    Example:

    ```python
    >>> from lever_grpo.search.samplers import checked_shares
    >>> checked_shares("random", None, pool_size=4, seed=0)
    {'random': 1.0}

    ```
    """
    if pool_size < 1 or seed < 0:
        raise ValueError(f"pool_size must be at least 1 and seed not negative, got {pool_size} and {seed}")
    if method not in (*METHODS, "mix"):
        raise ValueError(f"method must be one of {[*METHODS, 'mix']}, got {method!r}")
    if (method == "mix") != (ratios is not None):
        raise ValueError(f"ratios belong to method='mix' and to no other, got method={method!r} and ratios={ratios!r}")
    shares = {method: 1.0} if ratios is None else dict(ratios)
    unknown = [name for name in shares if name not in METHODS]
    if unknown or not shares or not all(share >= 0 for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise ValueError(
            f"ratios must be shares of {list(METHODS)}, not negative and at most 1 together, got {ratios!r}"
        )
    return shares


def _choose(
    shares: Mapping[str, float],
    rankings: Mapping[str, list[NDArray[np.int64]]],
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    left_out: list[NDArray[np.int64]],
    pool_size: int,
    seed: int,
) -> list[list[int]]:
    """The pools of queries that have enough candidates; rankings are positions among these."""
    ends = np.rint(np.cumsum(list(shares.values())) * pool_size).astype(int).tolist()
    pools = []
    for i, query in enumerate(queries.tolist()):
        pool: dict[int, None] = {}  # an ordered set
        rng = np.random.default_rng([seed, query])
        for name, end in [*zip(shares, ends, strict=True), ("random", pool_size)]:
            if len(pool) == pool_size:
                break
            if name == "random":
                # enough for all of them to be left out or in the pool already, but for those that are missing
                draws = min(len(candidates), max(0, end - len(pool)) + len(left_out[i]) + len(pool))
                ranking = rng.choice(len(candidates), draws, replace=False)
                ranking = ranking[~np.isin(ranking, left_out[i])]
            else:
                ranking = rankings[name][i]
            for position in ranking.tolist():
                if len(pool) < end:
                    pool[position] = None
        pools.append(candidates[list(pool)].tolist())
    return pools


def _ids(name: str, values: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    ids = np.asarray(values)
    if ids.ndim != 1 or len(ids) and (ids.dtype.kind not in "iu" or ids.min() < 0):
        raise ValueError(f"{name} must be a list of row ids (whole numbers from 0 on), got {values!r:.100}")
    return ids.astype(np.int64)


def _check_floats(name: str, rows: NDArray | None) -> NDArray:
    if rows is None:
        raise ValueError(
            f"method '{name}_sim' needs embeddings: pass {name}=, an array (N, width) with a row a row id"
        )
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise ValueError(f"{name} must be floats of shape (N, width), got {rows.dtype} of shape {rows.shape}")
    return rows


def _rows_of(name: str, table: NDArray | None, ids: NDArray[np.int64]) -> NDArray:
    """Rows of ids, from a table that has a row a row id."""
    table = _check_floats(name, table)
    outside = ids[ids >= len(table)]
    if len(outside):
        raise BeamDataError(f"{name}: expected row ids from 0 to {len(table) - 1}, found {_some(outside)}")
    return np.asarray(table[ids])


def _checked(name: str, rows: NDArray | None, ids: NDArray[np.int64]) -> NDArray:
    """Rows of ids, one each: finite floats."""
    rows = _check_floats(name, rows)
    if len(rows) != len(ids):
        raise BeamDataError(f"{name}: expected a row for each of {len(ids)} ids, found {len(rows)}")
    bad = np.unique(ids[~np.isfinite(rows).all(axis=1)])
    if len(bad):
        raise BeamDataError(f"{name}: expected finite numbers, found NaN or infinity in {len(bad)} rows: {_some(bad)}")
    return rows


def _short(
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    left_out: list[NDArray[np.int64]],
    pool_size: int,
    allowed: bool,
) -> NDArray[np.bool_]:
    """Which queries have too few candidates; an error if some have, and that is not allowed, or if all have."""
    counts = len(candidates) - np.array([len(positions) for positions in left_out], np.int64)
    short = counts < pool_size
    if short.any():
        ids = queries[short]
        worst = counts[short].argmin()
        message = (
            f"{len(ids)} of {len(queries)} queries have fewer candidates than pool_size={pool_size}: {_some(ids)}; "
            f"query {ids[worst]} has {counts[short][worst]} of {len(candidates)}, without itself and rows about the "
            "same entity; lower pool_size or give more candidates"
        )
        if short.all() or not allowed:
            raise BeamDataError(message)
        logger.warning("%s", message)
    return short


class _Neighbours:
    """Rows of candidates (C, D), and which of them are nearest to a query's."""

    def __init__(self, given: NDArray):
        self.given = given
        self.rows = given.astype(np.float32, copy=False)

    @cached_property
    def longest(self) -> float:
        return float(np.linalg.norm(self.rows, axis=1).max())

    @cached_property
    def index(self) -> Any:
        try:
            from usearch.index import Index
        except ImportError as error:
            raise ImportError(
                f"{len(self.rows)} candidates are more than the {EXACT_LIMIT} that are compared one by one; the index "
                "for more needs usearch: pip install 'lever_grpo[search]'"
            ) from error
        index = Index(ndim=self.rows.shape[1], metric="ip", dtype="f32")
        # one thread: the graph depends on the order in which points come in
        index.add(np.arange(len(self.rows)), self.rows, threads=1)
        return index

    def nearest(self, queries: NDArray, left_out: list[NDArray[np.int64]], size: int) -> list[NDArray[np.int64]]:
        """
        Positions of the nearest `size` candidates of each query, nearest first.

        A matrix product finds who can be among them, within its rounding error. That error depends on which queries
        share a block, so their order is decided by products that are summed one pair at a time, in double precision.
        """
        sides = queries.astype(np.float32, copy=False)  # (Q, D)
        if len(self.rows) > EXACT_LIMIT:
            return [self._by_index(side, out, size) for side, out in zip(sides, left_out, strict=True)]
        block = max(1, _BLOCK // len(self.rows))
        nearest = []
        for start in range(0, len(sides), block):
            part = sides[start : start + block]  # (B, D)
            products = part @ self.rows.T  # (B, C)
            # twice the bound of an inner product's rounding error (Higham 2002, section 3.1)
            errors = 2 * part.shape[1] * np.finfo(np.float32).eps * self.longest * np.linalg.norm(part, axis=1)
            for i, (side, product, error) in enumerate(zip(part, products, errors, strict=True), start):
                product[left_out[i]] = -np.inf
                least = np.partition(product, -size)[-size] - error
                nearest.append(self._in_order(side, np.flatnonzero(product >= least), size))
        return nearest

    def _by_index(self, side: NDArray, out: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """Approximately: what a query lacks after its own rows are taken out, is searched for exactly."""
        self.index.expansion_search = max(256, 4 * size)
        found = np.setdiff1d(self.index.search(side, size + len(out), threads=1).keys.astype(np.int64), out)
        if len(found) < size:
            found = np.setdiff1d(np.arange(len(self.rows)), out, assume_unique=True)
        return self._in_order(side, found, size)

    def _in_order(self, side: NDArray, positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
        """The nearest `size` of the candidates at these positions, which ascend."""
        products = (self.rows[positions].astype(np.float64) * side.astype(np.float64)).sum(axis=1)
        return positions[np.argsort(-products, kind="stable")[:size]]


def _fingerprint(
    about: tuple,
    queries: NDArray[np.int64],
    candidates: NDArray[np.int64],
    left_out: list[NDArray[np.int64]],
    features: Mapping[str, tuple[NDArray, NDArray]],
) -> str:
    """Digest of everything that pools depend on; of each feature, the rows of the queries and of the candidates."""
    digest = hashlib.sha256(repr((_VERSION, about, [positions.tolist() for positions in left_out])).encode())
    for ids in (queries, candidates):
        digest.update(repr(len(ids)).encode() + ids.tobytes())
    for name, sides in features.items():
        digest.update(f"{name} {sides[0].dtype} {sides[0].shape[1]}".encode())
        for rows in sides:
            for start in range(0, len(rows), 65_536):
                digest.update(np.ascontiguousarray(rows[start : start + 65_536]).tobytes())
    return digest.hexdigest()[:32]


def _read_pools(path: Path, queries: int, pool_size: int) -> list[list[int]]:
    try:
        pools = json.loads(path.read_bytes())
    except ValueError as error:
        raise BeamDataError(f"{path}: expected a cache of pools, found invalid JSON ({error}); delete it") from error
    sizes = [len(pool) for pool in pools]
    if sizes != [pool_size] * queries:
        raise BeamDataError(f"{path}: expected {queries} pools of {pool_size} candidates, found others; delete it")
    return pools


def _some(values: NDArray[np.int64]) -> str:
    return ", ".join(map(str, values[:5].tolist())) + (", …" if len(values) > 5 else "")
