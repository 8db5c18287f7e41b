"""The search that makes a beam log: every single, then the extensions of the best few, all queries side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from ..data.examples import Example
from ..data.orders import to_prompt_order
from ..scorers.protocol import Prompt, Scorer, ScorerError
from ..scorers.scores import SCORES, mean_log_prob
from .judges import COLUMNS, MAX_NEW_TOKENS, Judge, make_judge


logger = logging.getLogger(__name__)

MAX_SHOTS = 8
ABSOLUTE = "log_prob"  # the score that is not relative to zero-shot
NOT_ASKED = "the model could not be asked (the log of the run says why)"  # by a scorer that does not keep reasons
JUDGED = ("none", "survivors", "all")

Sequence_ = tuple[int, ...]  # positions in the pool, in search order


@dataclass(frozen=True)
class SearchConfig:
    """
    What is searched, and what is scored beside it.

    Args:
        num_shots (`int`, *optional*, defaults to `2`):
            Demonstrations of the survivors, 1 to 8. Every shorter length is scored on the way.
        beam_size (`int`, *optional*, defaults to `5`):
            Sequences that are extended at each step, and that survive the last one. A step of a pool of K costs about
            `beam_size * K` prompts.
        score (`str`, *optional*, defaults to `"infoscore"`):
            `"infoscore"` or `"logprob_gain"`, both over zero-shot, so that `zero_shot` is 0 in the log; or
            `"log_prob"`, the mean log-probability itself, as in the packaged sample.
        construct_order (`str`, *optional*, defaults to `"left"`):
            Where the demonstration found last stands: `"left"` is first in the prompt, `"right"` next to the query.
        unordered (`bool`, *optional*, defaults to `False`):
            Whether a set of demonstrations is scored once, in the order in which it was found first. Otherwise every
            order is a sequence of its own.
        random_sequences (`int`, *optional*, defaults to `0`):
            Sequences drawn from the pool, for contrast. One that the search has scored anyway is not scored again.
        similarity_sequences (`int`, *optional*, defaults to `0`):
            Runs of neighbours in the pool, for contrast: the first holds the first `num_shots` candidates (the
            nearest, where the pool is ranked), the next starts one further.
        judge (`str`, *optional*, defaults to `"none"`):
            Which sequences the model also answers with: `"none"`, `"survivors"` or `"all"`.
        judge_by (`str`, *optional*, defaults to `"accuracy"`):
            What its answers are worth: `"accuracy"`, in the column `correct`, or, for captions, `"cider"`, in the
            column of that name; see [`make_judge`].
        seed (`int`, *optional*, defaults to `0`):
            Of the random sequences.

    Raises:
        ValueError: if a value is out of its range.

    Example:

    ```python
    >>> from lever_grpo.search import SearchConfig
    >>> SearchConfig(num_shots=4, score="log_prob").beam_size
    5
    >>> SearchConfig(num_shots=9)
    Traceback (most recent call last):
        ...
    ValueError: num_shots=9 must lie in 1…8.

    ```
    """

    num_shots: int = 2
    beam_size: int = 5
    score: str = "infoscore"
    construct_order: str = "left"
    unordered: bool = False
    random_sequences: int = 0
    similarity_sequences: int = 0
    judge: str = "none"
    judge_by: str = "accuracy"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_shots <= MAX_SHOTS:
            raise ValueError(f"num_shots={self.num_shots} must lie in 1…{MAX_SHOTS}.")
        for name, least in (("beam_size", 1), ("random_sequences", 0), ("similarity_sequences", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        choices = {
            "score": (*SCORES, ABSOLUTE),
            "construct_order": ("left", "right"),
            "judge": JUDGED,
            "judge_by": tuple(COLUMNS),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")

    @property
    def columns(self) -> list[str]:
        """The columns of a record, beside its scores."""
        return [ABSOLUTE] if self.judge == "none" else [ABSOLUTE, COLUMNS[self.judge_by]]

    def gain(self, new_mean: float, parent_mean: float) -> float:
        """What a mean log-probability is worth over another; of `"log_prob"`, the difference."""
        return new_mean - parent_mean if self.score == ABSOLUTE else SCORES[self.score](new_mean, parent_mean)

    def key(self, sequence: Sequence_) -> Any:
        """What two sequences that are scored once have in common."""
        return frozenset(sequence) if self.unordered else sequence


def beam_search(
    scorer: Scorer,
    queries: Sequence[Example],
    pools: Sequence[Sequence[Example]],
    config: SearchConfig,
    *,
    proposals: Callable[[int], Iterable[Sequence[int]]] | None = None,
    judge: Judge | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """
    Searches demonstrations for some queries at once, and keeps everything that was scored.

    Each step is one call of the scorer for all queries: zero-shot, then every single, then every extension of each
    query's best, and what is scored for contrast at last. Equal scores rank in the order in which they were found.

    Args:
        scorer ([`Scorer`]):
            The frozen model.
        queries (`Sequence[Example]`):
            The queries.
        pools (`Sequence[Sequence[Example]]`):
            The candidates of each query, without the query itself.
        config ([`SearchConfig`]):
            What is searched.
        proposals (`Callable`, *optional*):
            Query id → more sequences of `num_shots` pool positions in search order, as a selector samples them; their
            `source` is `"selector"`.
        judge (`Callable`, *optional*):
            What an answer is worth, as [`make_judge`] makes it of the whole task; `judge_by="cider"` needs it. By
            default it is made of these queries and pools.

    Returns:
        `tuple` of two lists of JSON-able dicts. A **record** for each query that was searched, as [`load_beams`] reads
        them: all sequences with their scores, the gains of their steps (where all their beginnings were scored, and
        the score is a gain), the last step's survivors, and the columns `log_prob` and, when judged, `correct` or
        `cider` (`None` where the model was not asked, or had no answer). And **failures**: `query_id`, `kind`
        (`"pool"`: too few candidates, `"value"`: no usable number, `"scorer"`: the scorer raised), `reason`, the
        `sequences` of row ids in search order that have no score, and `skipped`, whether the query has no record for
        it. If the scorer raises [`ScorerError`], the queries are asked one by one.

    Raises:
        ValueError: if the pools do not fit the queries, hold a query itself or a candidate twice, if a proposal is no
            sequence of `num_shots` positions, or if there is no judge but CIDEr asked for.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.search import SearchConfig, beam_search

    >>> class Length:  # likes long answers in front of the query
    ...     def score(self, prompts):
    ...         return [np.array([-9.0 + sum(len(d.answers[0]) for d in p.demonstrations)]) for p in prompts]

    >>> rows = [Example(i, "?", (answer,)) for i, answer in enumerate(["a", "bb", "cccc", "ddd"])]
    >>> config = SearchConfig(num_shots=2, beam_size=1, score="logprob_gain")
    >>> records, failures = beam_search(Length(), rows[:1], [rows[1:]], config)
    >>> records[0]["sequences"], records[0]["scores"], failures
    ([[0], [1], [2], [1, 0], [1, 2]], [2.0, 4.0, 3.0, 6.0, 7.0], [])
    >>> [s for s, survived in zip(records[0]["sequences"], records[0]["survived"]) if survived]
    [[1, 2]]

    ```
    """
    _check_pools(queries, pools)
    if judge is None and config.judge != "none":
        if config.judge_by == "cider":
            raise ValueError('judge_by="cider" needs the judge of the whole task: judge=make_judge("cider", rows).')
        judge = make_judge("accuracy", chain(queries, *pools))
    try:
        return _search_together(scorer, queries, pools, config, proposals, judge)
    except ScorerError as error:
        if len(queries) == 1:
            return [], [_failure(queries[0].id, "scorer", str(error), skipped=True)]
        logger.warning("the scorer failed on %d queries, which are now asked one by one: %s", len(queries), error)
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    for query, pool in zip(queries, pools, strict=True):
        alone = beam_search(scorer, [query], [pool], config, proposals=proposals, judge=judge)
        records += alone[0]
        failures += alone[1]
    return records, failures


@dataclass
class _Search:
    """What is known of one query. Dicts keep the order in which sequences were found."""

    query: Example
    pool: Sequence[Example]
    means: dict[Sequence_, float] = field(default_factory=dict)  # mean log-probability; of () it is zero-shot
    worth: dict[Sequence_, float | None] = field(default_factory=dict)  # of the model's own answers
    source: dict[Sequence_, str] = field(default_factory=dict)
    failed: dict[str, list[Sequence_]] = field(default_factory=dict)  # reason: sequences
    seen: set[Any] = field(default_factory=set)
    beams: list[Sequence_] = field(default_factory=lambda: [()])
    skipped: tuple[str, str] | None = None  # kind and reason

    def prompt(self, sequence: Sequence_, config: SearchConfig) -> Prompt:
        order = to_prompt_order(sequence, config.construct_order)
        return Prompt(self.query, tuple(self.pool[position] for position in order))

    def new(self, sequences: Iterable[Sequence_], config: SearchConfig) -> Iterator[Sequence_]:
        """Those that were not asked about before."""
        for sequence in sequences:
            key = config.key(sequence)
            if key not in self.seen:
                self.seen.add(key)
                yield sequence

    def extensions(self) -> Iterator[Sequence_]:
        for beam in self.beams:
            yield from ((*beam, position) for position in range(len(self.pool)) if position not in beam)

    def keep_best(self, asked: Sequence[Sequence_], config: SearchConfig) -> None:
        scored = [sequence for sequence in asked if sequence in self.means]
        # a sort keeps the order of equal scores
        self.beams = sorted(scored, key=self.score(config), reverse=True)[: config.beam_size]
        if not self.beams:
            # the zero-shot prompt is the one sequence of its step
            what = f"any of the {len(asked)} sequences of {len(asked[0])} shots" if asked[0] else "zero-shot"
            reasons = [reason for reason, sequences in self.failed.items() if asked[-1] in sequences]
            self.skipped = ("value", f"no usable score of {what}: {reasons[0]}")

    def score(self, config: SearchConfig) -> Callable[[Sequence_], float]:
        if config.score == ABSOLUTE:
            return self.means.__getitem__
        return lambda sequence: config.gain(self.means[sequence], self.means[()])

    def shot_scores(self, sequence: Sequence_, config: SearchConfig) -> list[float]:
        """Gains of the steps; empty where they are not known, or do not add up to the score."""
        path = [sequence[:length] for length in range(len(sequence) + 1)]
        if config.score == ABSOLUTE or not all(part in self.means for part in path):
            return []
        return [config.gain(self.means[new], self.means[old]) for old, new in zip(path, path[1:], strict=False)]

    def record(self, config: SearchConfig) -> dict[str, Any]:
        sequences = [sequence for sequence in self.means if sequence]
        score = self.score(config)
        columns: tuple[Mapping[Sequence_, float | None], ...] = (self.means, self.worth)  # the second when judged
        return {
            "query_id": self.query.id,
            "candidate_ids": [candidate.id for candidate in self.pool],
            "sequences": [list(sequence) for sequence in sequences],
            "scores": [score(sequence) for sequence in sequences],
            "shot_scores": [self.shot_scores(sequence, config) for sequence in sequences],
            "survived": [sequence in self.beams for sequence in sequences],
            "zero_shot": score(()),
            "source": [self.source[sequence] for sequence in sequences],
            "columns": {
                name: [values.get(sequence) for sequence in sequences]
                for name, values in zip(config.columns, columns, strict=False)
            },
            "notes": {"failed": sum(map(len, self.failed.values()))},
        }

    def failures(self) -> list[dict[str, Any]]:
        if self.skipped is not None:
            return [_failure(self.query.id, *self.skipped, skipped=True)]
        return [
            _failure(self.query.id, "value", reason, [[self.pool[p].id for p in s] for s in sequences])
            for reason, sequences in self.failed.items()
        ]


def _failure(
    query_id: int, kind: str, reason: str, sequences: list[list[int]] | None = None, skipped: bool = False
) -> dict[str, Any]:
    return {
        "query_id": query_id,
        "kind": kind,
        "reason": reason,
        "sequences": sequences or [],
        "skipped": skipped,
    }


def _search_together(
    scorer: Scorer,
    queries: Sequence[Example],
    pools: Sequence[Sequence[Example]],
    config: SearchConfig,
    proposals: Callable[[int], Iterable[Sequence[int]]] | None,
    judge: Judge | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    searches = [_Search(query, pool) for query, pool in zip(queries, pools, strict=True)]
    for search in searches:
        if len(search.pool) < config.num_shots:
            search.skipped = ("pool", f"a pool of {len(search.pool)} is too small for {config.num_shots} shots")

    def live() -> list[_Search]:
        return [search for search in searches if search.skipped is None]

    for shots in range(config.num_shots + 1):
        step = [(s, list(s.new(s.extensions() if shots else [()], config))) for s in live()]
        _score(scorer, [(search, sequence, "search") for search, asked in step for sequence in asked], config)
        for search, asked in step:
            search.keep_best(asked, config)
    contrast = [
        (search, sequence, source)
        for search in live()
        for source, sequences in _contrast(search, config, proposals)
        for sequence in search.new(sequences, config)
    ]
    _score(scorer, contrast, config)

    if judge is not None and config.judge != "none":
        _judge(scorer, live(), config, judge)
    records = [search.record(config) for search in live()]
    return records, [failure for search in searches for failure in search.failures()]


def _score(scorer: Scorer, asked: Sequence[tuple[_Search, Sequence_, str]], config: SearchConfig) -> None:
    """One call: the mean log-probabilities, or why there is none."""
    if not asked:
        return
    prompts = [search.prompt(sequence, config) for search, sequence, _ in asked]
    results = scorer.score(prompts)
    _check_count("score", results, asked)
    problems = getattr(scorer, "problems", {})
    for (search, sequence, source), prompt, log_probs in zip(asked, prompts, results, strict=True):
        reason = problems.get(prompt, NOT_ASKED) if log_probs is None else unusable(log_probs)
        if reason:
            search.failed.setdefault(reason, []).append(sequence)
        else:
            search.means[sequence] = mean_log_prob(log_probs)  # type: ignore[arg-type]
            search.source[sequence] = source


def unusable(log_probs: Any) -> str:
    """What is wrong with the log-probabilities of an answer, or an empty string."""
    values = np.asarray(log_probs, dtype=np.float64)
    if not values.size:
        return "the answer has no tokens"
    if not np.isfinite(values).all():
        return "NaN or infinite log-probabilities"
    if values.max() > 0.1:  # half-precision may round a little above 0
        return "log-probabilities above 0"
    return ""


def _contrast(
    search: _Search, config: SearchConfig, proposals: Callable[[int], Iterable[Sequence[int]]] | None
) -> Iterator[tuple[str, list[Sequence_]]]:
    """Source and sequences of what is scored beside the search."""
    size, shots = len(search.pool), config.num_shots
    windows = min(config.similarity_sequences, size - shots + 1)
    yield "similarity", [tuple(range(start, start + shots)) for start in range(windows)]
    rng = np.random.default_rng([config.seed, search.query.id])
    wanted = min(config.random_sequences, (math.comb if config.unordered else math.perm)(size, shots))
    drawn: dict[Any, Sequence_] = {}
    while len(drawn) < wanted:
        sequence = tuple(rng.permutation(size)[:shots].tolist())
        drawn.setdefault(config.key(sequence), sequence)
    yield "random", list(drawn.values())
    proposed = [] if proposals is None else [tuple(map(int, s)) for s in proposals(search.query.id)]
    for sequence in proposed:
        if len(set(sequence)) != shots or len(sequence) != shots or not all(0 <= p < size for p in sequence):
            raise ValueError(
                f"query {search.query.id}: proposal {list(sequence)}: expected {shots} different positions in the "
                f"pool of {size}."
            )
    yield "selector", proposed


def _judge(scorer: Scorer, searches: Sequence[_Search], config: SearchConfig, judge: Judge) -> None:
    """One call: what the model's own answers are worth."""
    asked = [(s, q) for s in searches for q in (s.beams if config.judge == "survivors" else filter(None, s.means))]
    prompts = [search.prompt(sequence, config) for search, sequence in asked]
    answers = scorer.answer(prompts, max_new_tokens=MAX_NEW_TOKENS[config.judge_by])
    _check_count("answer", answers, asked)
    for (search, sequence), answer in zip(asked, answers, strict=True):
        search.worth[sequence] = None if answer is None else judge(answer, search.query.answers)


def _check_count(method: str, results: Sequence[Any], asked: Sequence[Any]) -> None:
    if len(results) != len(asked):
        raise ValueError(f"{method}() gave {len(results)} results for {len(asked)} prompts: expected one for each.")


def _check_pools(queries: Sequence[Example], pools: Sequence[Sequence[Example]]) -> None:
    if len(queries) != len(pools):
        raise ValueError(f"{len(queries)} queries and {len(pools)} pools: expected a pool for each query.")
    ids = [query.id for query in queries]
    if len(set(ids)) != len(ids):
        raise ValueError(f"queries {sorted({i for i in ids if ids.count(i) > 1})} are there twice: give each once.")
    for query, pool in zip(queries, pools, strict=True):
        candidates = [candidate.id for candidate in pool]
        if query.id in candidates:
            raise ValueError(
                f"query {query.id} is in its own pool: take it out, as its answer would stand in the prompt."
            )
        if len(set(candidates)) != len(candidates):
            raise ValueError(f"query {query.id}: its pool {candidates} holds a candidate twice: give each once.")
