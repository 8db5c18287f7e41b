"""A trained selector for raw queries: embed, retrieve a pool, pick."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from transformers import AutoProcessor

from ..atomic import atomic_file
from ..data import DataCollatorForRawBeams, EmbeddingStore, Example, to_prompt_order
from ..models import ClipSelector, SelectorModel, load_selector
from ..search.features import ENCODERS_FILE, MAPS_FILE, FeatureEncoder, FeatureMap, load_encoders
from ..search.samplers import PoolSampler, checked_shares


ROWS_AT_A_TIME = 64  # of rows that a selector embeds itself


@dataclass(frozen=True)
class Selection:
    """
    What was picked for a query.

    Args:
        query ([`Example`]):
            The query.
        demonstrations (`tuple[Example, ...]`):
            In prompt order: the last one stands next to the query.
        log_prob (`float`):
            Log-probability of the sequence under the selector, in nats.
        pool (`tuple[Example, ...]`):
            The candidates that were picked from, nearest first unless they were drawn or are all there are.
    """

    query: Example
    demonstrations: tuple[Example, ...]
    log_prob: float
    pool: tuple[Example, ...] = ()


class DemonstrationSelector:
    """
    Picks demonstrations for raw queries.

    Queries and candidates are embedded by the encoders that the selector was trained with, a pool is retrieved for
    each query, and the selector picks from it. Embeddings that are there already can be given instead, but not to a
    [`ClipSelector`], which makes its own of the texts and images of the rows.

    Args:
        selector ([`SelectorModel`]):
            A trained selector of any version.
        encoders (`dict[str, FeatureEncoder]`, *optional*), maps (`dict[str, FeatureMap]`, *optional*):
            How its features are made of rows; see [`load_encoders`].
        construct_order (`str`, *optional*, defaults to `"left"`):
            Where the search put a new demonstration; decides on the order in the prompt.
        processor (`ProcessorMixin`, *optional*):
            Of a [`ClipSelector`]: that of its CLIP, which comes with the checkpoint.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo import DemonstrationSelector, PointerSelector, PointerSelectorConfig
    >>> from lever_grpo.data import EmbeddingStore, Example
    >>> network = PointerSelector(PointerSelectorConfig(embed_dim=4, encoder="none", similarity_prior=True))
    >>> selector = DemonstrationSelector(network)
    >>> rows = [Example(i, f"{i}?", (str(i),)) for i in range(3)]
    >>> vectors = EmbeddingStore({"embedding": np.eye(4, dtype=np.float32)[[0, 1, 2]]})
    >>> selector.set_candidates(rows, embeddings=vectors)
    >>> query = EmbeddingStore({"embedding": np.array([[0, 1, 0.1, 0]], np.float32)})
    >>> (picked,) = selector.select([Example(9, "which?", ("?",))], num_shots=2, embeddings=query)
    >>> [row.id for row in picked.demonstrations]  # the first pick stands next to the query
    [2, 1]

    ```
    """

    def __init__(
        self,
        selector: SelectorModel,
        encoders: Mapping[str, FeatureEncoder] | None = None,
        maps: Mapping[str, FeatureMap] | None = None,
        construct_order: str = "left",
        processor: Any = None,
    ):
        if isinstance(selector, ClipSelector) and processor is None:
            raise ValueError("a ClipSelector reads texts and images: give the processor of its CLIP.")
        self.selector = selector.eval()
        self.processor = processor
        self.encoders, self.maps = dict(encoders or {}), dict(maps or {})
        self.construct_order = construct_order
        self.candidates: list[Example] = []
        self._store: EmbeddingStore | None = None
        self._known: defaultdict[Any, list[int]] = defaultdict(list)  # positions by what rows are recognised by
        self._about: defaultdict[str | None, list[int]] = defaultdict(list)  # and by entity
        self._samplers: dict[tuple[str, ...], PoolSampler] = {}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device | None = None,
        construct_order: str = "left",
    ) -> DemonstrationSelector:
        """
        Loads a selector with its encoders.

        Args:
            path (`str` or `Path`):
                Folder or Hub id.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            device (`str` or `torch.device`, *optional*):
                Where the selector and the encoders run.
            construct_order (`str`, *optional*, defaults to `"left"`):
                As above.
        """
        selector: Any = load_selector(path, revision=revision or "main")
        folder = Path(path)
        if not folder.is_dir():
            names = [ENCODERS_FILE, MAPS_FILE]
            folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=names))
        processor = None
        if isinstance(selector, ClipSelector):
            processor = AutoProcessor.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
        return cls(selector.to(device) if device else selector, *load_encoders(folder), construct_order, processor)

    @torch.inference_mode()
    def set_candidates(self, candidates: Sequence[Example], embeddings: EmbeddingStore | None = None) -> None:
        """
        Embeds the candidates, and computes what the selector makes of them alone. To be called again if the selector's
        weights change.

        Args:
            candidates (`list[Example]`):
                Rows with answers, each id once.
            embeddings (`EmbeddingStore`, *optional*):
                Their features, row `i` those of `candidates[i]`, instead of the encoders.

        Raises:
            ValueError: if an id is there twice, a feature has neither embeddings nor an encoder, or a selector that
                embeds rows itself is given embeddings.
        """
        if len({row.id for row in candidates}) < len(candidates):
            raise ValueError("candidates have an id twice; each row may stand in a prompt once, so give each its own.")
        store = self._embedded(candidates, self.selector.config.candidate_features, embeddings, answered=True)
        everything = np.arange(len(candidates))
        found = store.gather(everything, list(self.selector.config.candidate_features))
        self._encoding = self.selector.encode_candidates(torch.from_numpy(found).to(self.selector.device))
        self.candidates, self._store, self._samplers = list(candidates), store, {}
        # a query that is a candidate too, or about the same thing as some, must not see these
        self._known, self._about = defaultdict(list), defaultdict(list)
        for i, row in enumerate(candidates):
            for key in _known_by(row, row.external_id is not None):
                self._known[key].append(i)
            self._about[row.entity].append(i)

    @torch.inference_mode()
    def select(
        self,
        queries: Sequence[Example],
        num_shots: int = 2,
        *,
        pool_size: int = 64,
        sampler: str = "text_sim",
        ratios: Mapping[str, float] | None = None,
        seed: int = 0,
        embeddings: EmbeddingStore | None = None,
        num_beams: int = 1,
        batch_size: int = 64,
    ) -> list[Selection]:
        """
        Picks demonstrations for queries.

        Args:
            queries (`list[Example]`):
                The queries; their answers are not looked at. A candidate with the query's id, whatever its question,
                or about the query's entity is not in its pool. The id is the `external_id` where there is one, as row
                ids are then mere positions, else the row id; `7` and `"7"` are the same. Of a row with and a row
                without `external_id`, the same row id and question (case and spaces aside) count as well: copies lose
                it easily. The same question alone does not, as it may be about another image.
            num_shots (`int`, *optional*, defaults to `2`):
                Number of demonstrations; of a selector that may stop, the most.
            pool_size (`int`, *optional*, defaults to `64`):
                Candidates that the selector sees of each query; all that it may see if these are fewer.
            sampler (`str`, *optional*, defaults to `"text_sim"`), ratios (`dict[str, float]`, *optional*), seed:
                How pools are retrieved, see [`sample_pools`]: by the features `question` and `image`, or by what both
                sides share where there is no such. What is random depends on `seed` and the query's id (its
                `external_id`, if it has one), whatever else is asked for in the call.
            embeddings (`EmbeddingStore`, *optional*):
                Features of the queries, row `i` those of `queries[i]`, instead of the encoders.
            num_beams (`int`, *optional*, defaults to `1`):
                Width of the selector's beam search.
            batch_size (`int`, *optional*, defaults to `64`):
                Queries at a time.

        Returns:
            `list[Selection]`, in the order of the queries.

        Raises:
            ValueError: if there are no candidates or none that a query may see, an option is out of range, a feature
                has neither embeddings nor an encoder, or a selector that embeds rows itself is given embeddings.
        """
        if self._store is None:
            raise ValueError("there are no candidates to pick from; call set_candidates first.")
        checked_shares(sampler, ratios, pool_size, seed)  # here: a pool of all candidates is not sampled
        if not queries:
            return []
        config = self.selector.config
        store = self._embedded(queries, config.query_features, embeddings)
        embeds = torch.from_numpy(store.gather(np.arange(len(queries)), list(config.query_features)))
        pools = self._pools(queries, store, pool_size, sampler, ratios, seed)
        picked: list[Selection] = []
        device = self.selector.device
        for start in range(0, len(queries), batch_size):
            part = slice(start, start + batch_size)
            sizes = torch.tensor([len(pool) for pool in pools[part]], device=device)
            longest, mask = int(sizes.max()), None
            if sizes.min() == len(self.candidates):  # each has all
                candidates, indices = self._encoding, None
            else:  # what several pools have goes to the selector once; padding is what a pool has anyway
                padded = [pool + pool[:1] * (longest - len(pool)) for pool in pools[part]]  # (B, K)
                used, indices = torch.tensor(padded, device=device).unique(return_inverse=True)
                candidates = self._encoding.rows(used)
                if sizes.min() < longest:
                    mask = torch.arange(longest, device=device) < sizes[:, None]  # (B, K)
            chosen: Any = self.selector.select(
                embeds[part].to(device),
                candidates,
                mask,
                candidate_indices=indices,
                num_shots=num_shots,
                num_beams=num_beams,
            )
            rows = zip(
                queries[part], pools[part], chosen.sequences[:, 0].tolist(), chosen.scores[:, 0].tolist(), strict=True
            )
            for query, pool, sequence, score in rows:
                order = to_prompt_order([pool[i] for i in sequence if i >= 0], self.construct_order)
                shown, among = tuple(self.candidates[i] for i in order), tuple(self.candidates[i] for i in pool)
                picked.append(Selection(query, shown, score, among))
        return picked

    def _embedded(
        self,
        rows: Sequence[Example],
        widths: Mapping[str, int],
        embeddings: EmbeddingStore | None,
        answered: bool = False,
    ) -> EmbeddingStore:
        """Features of rows, checked against what the selector reads; `answered` rows show their answers."""
        if isinstance(self.selector, ClipSelector):
            if embeddings is not None:
                raise ValueError(
                    f"embeddings are given ({', '.join(embeddings.names)}), and this selector makes its own of texts "
                    "and images; leave them out."
                )
            return self._embedded_by(self.selector, rows, answered)
        if embeddings is None:
            unknown = sorted(widths.keys() - self.encoders.keys())
            if unknown:
                raise ValueError(
                    f"the selector sees {', '.join(unknown)}, and its checkpoint does not say how these are made of "
                    f"rows ({ENCODERS_FILE}); give embeddings."
                )
            embeddings = EmbeddingStore({name: self.encode(name, rows) for name in widths})
        found = {name: embeddings.widths.get(name) for name in widths}
        if found != dict(widths) or len(embeddings) != len(rows):
            raise ValueError(
                f"embeddings have {len(embeddings)} rows of widths {embeddings.widths}; the selector reads "
                f"{dict(widths)}, of {len(rows)} rows."
            )
        return embeddings

    def _embedded_by(self, selector: ClipSelector, rows: Sequence[Example], answered: bool) -> EmbeddingStore:
        """Features that a selector makes of rows itself, some at a time."""
        collator = DataCollatorForRawBeams([], self.processor, selector.config.modalities)
        widths, parts = selector.config.query_features, []
        for start in range(0, len(rows), ROWS_AT_A_TIME):
            part = rows[start : start + ROWS_AT_A_TIME]
            numbers, items = collator.itemise([], part) if answered else collator.itemise(part, [])
            items = {name: values.to(selector.device) for name, values in items.items()}
            parts.append(selector.embed(numbers.to(selector.device), **items).float().cpu())
        split = torch.cat(parts).split(list(widths.values()), dim=-1)
        return EmbeddingStore({name: values.numpy() for name, values in zip(widths, split, strict=True)})

    def encode(self, name: str, rows: Sequence[Example]) -> NDArray[np.float32]:
        """A feature of rows, (N, width), by the encoder that the selector came with."""
        raw = self.encoders[name](rows, self.selector.device)
        return (self.maps[name](raw) if name in self.maps else raw[:, 0]).astype(np.float32)

    def _pools(
        self,
        queries: Sequence[Example],
        store: EmbeddingStore,
        pool_size: int,
        sampler: str,
        ratios: Mapping[str, float] | None,
        seed: int,
    ) -> list[list[int]]:
        """Candidates of each query, as positions among them."""
        assert self._store is not None
        shared = tuple(name for name in store.names if self._store.widths.get(name) == store.widths[name])
        first = len(self.candidates)
        if shared not in self._samplers:
            rows = _retrieved_by(self._store, shared, range(first))
            self._samplers[shared] = PoolSampler(range(first), **rows)
        left_out = [self._left_out(query) for query in queries]
        by_size: dict[int, list[int]] = defaultdict(list)  # what is hidden from one query is no matter of the others
        for i, (query, out) in enumerate(zip(queries, left_out, strict=True)):
            if len(out) == first:
                raise ValueError(
                    f"query {query.external_id or query.id}: all {first} candidates are the query itself or about its "
                    "entity, and these are never shown to it; give candidates about other things."
                )
            by_size[min(pool_size, first - len(out))].append(i)
        pools = [list(range(first))] * len(queries)
        for size, places in by_size.items():
            if size == first:  # all of them: nothing to retrieve
                continue
            found = self._samplers[shared].pools(
                sampler,
                [_number(queries[i]) for i in places],
                size,
                seed=seed,
                ratios=ratios,
                left_out=[left_out[i] for i in places],
                **_retrieved_by(store, shared, places),
            )
            for i, pool in zip(places, found, strict=True):
                pools[i] = pool
        return pools

    def _left_out(self, query: Example) -> NDArray[np.int64]:
        """Positions of candidates that the query must not see, ascending: itself, and rows about the same thing."""
        itself = [i for key in _known_by(query, query.external_id is None) for i in self._known.get(key, ())]
        entities = {self.candidates[i].entity for i in itself} if query.entity is None else {query.entity}
        about = [i for entity in entities - {None} for i in self._about.get(entity, ())]
        return np.unique(np.array(itself + about, np.int64))


def _known_by(row: Example, named: bool) -> tuple[str, tuple[bool, int, str]]:
    """
    By what a row is recognised: its id in the files, as text, and its row id with its question. The latter is to match
    only where one of two rows has an external id and the other has none: candidates say in `named` whether they have
    one, queries whether they have none.
    """
    name = str(row.id) if row.external_id is None else row.external_id
    return name, (named, row.id, " ".join(row.question.casefold().split()))


def _number(query: Example) -> int:
    """What the query's random choices are seeded by: the same in every call, so no position."""
    if query.external_id is None:
        return query.id
    return int.from_bytes(hashlib.sha256(query.external_id.encode()).digest()[:8], "big") >> 1  # an id at most


def _retrieved_by(store: EmbeddingStore, shared: Sequence[str], places: Sequence[int]) -> dict[str, Any]:
    """Rows (N, width) of N places by which pools are retrieved."""
    text = ["question"] if "question" in shared else [name for name in shared if name != "image"]
    sides = {"text": text, "image": [name for name in shared if name == "image"]}
    return {side: store.gather(places, names) if names else None for side, names in sides.items()}


def write_selections(selections: Sequence[Selection], path: str | Path) -> None:
    """JSON lines, one a query: `query_id`, the ids of its `demonstrations` in prompt order, their `questions` and
    `answers`, and `log_prob`."""
    with atomic_file(Path(path)) as stream:
        for picked in selections:
            record = {
                "query_id": picked.query.external_id or picked.query.id,
                "demonstrations": [row.external_id or row.id for row in picked.demonstrations],
                "questions": [row.question for row in picked.demonstrations],
                "answers": [row.answers[0] for row in picked.demonstrations],
                "log_prob": picked.log_prob,
            }
            stream.write(orjson.dumps(record) + b"\n")
