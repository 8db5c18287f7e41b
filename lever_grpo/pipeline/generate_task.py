"""What is searched: the queries among the rows of a task, their pools, and what a selector proposes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..atomic import atomic_file
from ..data.examples import Example
from ..data.images import open_image
from ..data.pools import PoolSource
from .frozen_model import open_store
from .generate_arguments import GenerateArguments
from .generate_folder import model_digest, rows_digest
from .generate_log import versions


logger = logging.getLogger(__name__)


MAX_GAPS = 100  # places of a table for each row, beyond a million


def choose_queries(arguments: GenerateArguments, rows: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Row ids of the queries, ascending, and of the candidates."""
    about = {row.id: row.entity if row.entity is not None else row.id for row in rows}
    things: list[str | int] = list(dict.fromkeys(about.values()))
    order = np.random.default_rng([arguments.seed, 0]).permutation(len(things))
    held_out = {things[i] for i in order[: round(arguments.heldout_share * len(things))].tolist()}
    candidates = [row.id for row in rows if about[row.id] not in held_out]
    queries = sorted(candidates if arguments.split != "heldout" else about.keys() - set(candidates))
    if arguments.query_ids is not None:
        unknown = sorted(set(arguments.query_ids) - set(queries))
        if unknown:
            raise ValueError(f"query_ids: {unknown[:5]} are no rows of the split {arguments.split!r}; choose others.")
        queries = sorted(set(arguments.query_ids))
    if arguments.num_queries is not None:
        if arguments.num_queries > len(queries):
            raise ValueError(f"num_queries={arguments.num_queries}: there are {len(queries)}; ask for fewer.")
        drawn = np.random.default_rng([arguments.seed, 1]).permutation(len(queries))[: arguments.num_queries]
        queries = sorted(queries[i] for i in drawn.tolist())
    if not queries:
        raise ValueError(f"split={arguments.split!r} with heldout_share={arguments.heldout_share} holds no query.")
    return queries, candidates


def make_pools(
    arguments: GenerateArguments, rows: dict[int, Example], queries: Sequence[int], candidates: Sequence[int]
) -> tuple[list[list[int]], dict[int, str]]:
    """
    Row ids of the candidates of each query, none where there are fewer than `pool_size`; and the rows that are left
    out because their image, by which the sampler compares, cannot be read: they are in no pool and have none.

    Raises:
        ValueError: if a query has no pool in `candidate_pools`, or no pool has candidates for `num_shots`.
    """
    unreadable: dict[int, str] = {}
    if arguments.candidate_pools is not None:
        pools = _given_pools(arguments, queries, candidates)
    else:
        pools, unreadable = _sampled_pools(arguments, rows, queries, candidates)
    largest = max(map(len, pools))
    if largest < arguments.num_shots:
        raise ValueError(
            f"num_shots={arguments.num_shots}: no pool has so many candidates, the largest one has {largest}; give "
            "larger pools or ask for fewer shots."
        )
    return pools, unreadable


def _given_pools(arguments: GenerateArguments, queries: Sequence[int], candidates: Sequence[int]) -> list[list[int]]:
    source, allowed = PoolSource(str(arguments.candidate_pools)), set(candidates)
    pools = []
    for query in queries:
        pool = source(query)
        unknown = None if pool is None else [i for i in pool if i not in allowed]
        if pool is None or unknown:
            found = "no pool" if pool is None else f"ids that the task does not have or holds out, {unknown}"
            raise ValueError(f"{arguments.candidate_pools}: query {query}: expected its candidates, found {found}.")
        pools.append(pool)
    return pools


def _sampled_pools(
    arguments: GenerateArguments, rows: dict[int, Example], queries: Sequence[int], candidates: Sequence[int]
) -> tuple[list[list[int]], dict[int, str]]:
    from ..search.samplers import sample_pools

    methods = arguments.shares or {arguments.sampler: 1.0}
    image = _image_embeddings(arguments, rows) if "image_sim" in methods else None
    unreadable = {} if image is None else _unreadable(rows, image)
    asked = [query for query in queries if query not in unreadable]
    sampled = sample_pools(
        arguments.sampler,
        asked,
        [candidate for candidate in candidates if candidate not in unreadable],
        arguments.pool_size,
        seed=arguments.seed,
        text=_text_embeddings(arguments, rows) if "text_sim" in methods else None,
        image=image,
        ratios=arguments.shares,
        entities={row.id: row.entity for row in rows.values() if row.entity is not None},
        allow_empty=True,
        cache_dir=arguments.embeddings_cache,
    )
    pool_of = dict(zip(asked, sampled, strict=True))
    return [pool_of.get(query, []) for query in queries], unreadable


def _text_embeddings(arguments: GenerateArguments, rows: dict[int, Example]) -> np.ndarray:
    from ..search.encoders import encode_texts

    store = open_store(arguments) if arguments.text_encoder is None else None
    if store is not None:
        return store[arguments.text_feature]
    encoder, revision = arguments.text_encoder, arguments.text_encoder_revision
    questions = [row.question for row in rows.values()]
    known_by = repr(("text", *_known_by(encoder, revision), questions))
    return _by_row(rows, _cached(arguments, known_by, lambda: encode_texts(questions, encoder, revision=revision)))


def _image_embeddings(arguments: GenerateArguments, rows: dict[int, Example]) -> np.ndarray:
    from ..search.encoders import encode_images

    store = open_store(arguments) if arguments.image_encoder is None else None
    if store is not None:
        return store[arguments.image_feature]
    without = [row.id for row in rows.values() if row.image is None]
    if without:
        raise ValueError(f"rows {without[:5]} have no image to compare; use another sampler, or give embeddings.")
    encoder, revision = arguments.image_encoder, arguments.image_encoder_revision
    images = [row.image for row in rows.values()]
    known_by = repr(("image", *_known_by(encoder, revision), rows_digest(rows)))
    return _by_row(
        rows, _cached(arguments, known_by, lambda: encode_images(images, encoder, revision=revision, skip_broken=True))
    )


def _known_by(encoder: str | None, revision: str | None) -> tuple[Any, ...]:
    """What the embeddings of an encoder depend on, beside the rows."""
    folder = Path(encoder) if encoder is not None else None
    return encoder, revision, model_digest(folder) if folder is not None and folder.is_dir() else None, versions()


def _cached(arguments: GenerateArguments, known_by: str, encode: Callable[[], np.ndarray]) -> np.ndarray:
    """Embeddings, from the cache where they were encoded before."""
    path = arguments.embeddings_cache / f"embeddings-{hashlib.sha256(known_by.encode()).hexdigest()[:32]}.npy"
    if path.exists():
        return np.load(path, allow_pickle=False)
    embeddings = encode()
    with atomic_file(path) as stream:
        np.save(stream, embeddings)
    return embeddings


def _unreadable(rows: dict[int, Example], embeddings: np.ndarray) -> dict[int, str]:
    """Why images that have no embedding cannot be read, by row id."""
    reasons = {}
    for row in rows.values():
        if np.isnan(embeddings[row.id, 0]):
            try:
                open_image(row.image)
            except (OSError, ValueError, SyntaxError) as error:
                # without the address in memory of bytes that it could not read
                reasons[row.id] = f"its image cannot be read: {type(error).__name__}: {str(error).split(' <_io.')[0]}"
    return reasons


def _by_row(rows: dict[int, Example], embeddings: np.ndarray) -> np.ndarray:
    if max(rows) >= MAX_GAPS * len(rows) + 1_000_000:
        raise ValueError(
            f"row id {max(rows)} is far above the number of rows, {len(rows)}: embeddings are tables with a place for "
            "every id up to the largest; number the rows from 0 on."
        )
    table = np.zeros((max(rows) + 1, embeddings.shape[1]), dtype=embeddings.dtype)
    table[list(rows)] = embeddings
    return table


def make_proposals(
    arguments: GenerateArguments, pools: dict[int, list[Example]]
) -> Callable[[int], list[list[int]]] | None:
    """What the selector samples from its policy for a query."""
    if arguments.selector is None:
        return None
    from ..data import DataCollatorForBeams
    from ..models import load_selector

    store = open_store(arguments)
    if store is None:
        raise ValueError(f"selector={arguments.selector!r} sees rows through embeddings; name them.")
    selector = load_selector(arguments.selector).eval()
    collator = DataCollatorForBeams(
        store, tuple(selector.config.query_features), tuple(selector.config.candidate_features)
    )
    inputs = ("query_embeds", "candidate_embeds", "candidate_indices", "candidate_mask")

    @torch.no_grad()
    def propose(query_id: int) -> list[list[int]]:
        ids = [candidate.id for candidate in pools[query_id]]
        batch = collator([{"query_id": query_id, "candidate_ids": ids, "sequences": [[0]], "scores": [0.0]}])
        seed = int(np.random.SeedSequence([arguments.seed, query_id]).generate_state(1)[0])
        sampled: Any = selector.select(
            **{name: batch[name] for name in inputs},
            num_shots=arguments.num_shots,
            min_shots=arguments.num_shots,
            do_sample=True,
            num_return_sequences=arguments.selector_sequences,
            generator=torch.Generator().manual_seed(seed),
        )
        return sampled.sequences[0].tolist()

    return propose
