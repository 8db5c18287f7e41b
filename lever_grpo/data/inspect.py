"""Health report of a beam log: what is in it, how much a group-relative method can learn from it, and what looks
wrong."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..terminal import printable
from .beam_json import log_metadata
from .embeddings import EmbeddingStore
from .groups import NOTES


TIE_EPSILON = 1e-6  # scores closer than this share of the group's largest magnitude are equal
SMALL_GROUP = 8  # fewer sequences than this a group, all of them survivors, leave little contrast


@dataclass
class LogReport:
    """What [`inspect_log`] found. Distributions are dicts with `min`, `median`, `mean`, `max`.

    Attributes:
        groups, queries, sequences (`int`): Rows, different queries, and sequences in all.
        group_sizes, pool_sizes (`dict`): Sequences a group and candidates a pool.
        lengths (`dict[int, int]`): Sequences of each number of shots.
        sources (`dict[str, int]`): Sequences by how they were found.
        survivors (`int`): Sequences that the search kept as beams.
        score (`dict`): `min`, `median`, `mean`, `max` and `std` of all scores.
        spread (`dict`): Standard deviation inside a group.
        survivor_spread (`dict`): The same among the survivors alone.
        zero_shot (`dict`): Scores without demonstrations, where known.
        gain_over_zero_shot (`float`): Share of sequences that are better than no demonstration (NaN if unknown).
        tied_groups (`int`): Groups whose scores are all equal: no gradient.
        single_groups (`int`): Groups of one sequence, which tie with themselves.
        tied_pairs (`float`): Share of pairs of sequences inside groups that have equal scores.
        usable_contrast (`float`): Share of the groups whose scores differ, and so give an advantage.
        contrast_share (`float`): Variance inside groups as a share of all variance. What is left are differences
        between queries,
            which no choice of demonstrations can change.
        columns (`dict[str, dict]`): For each reward column its range and `known`, the share of sequences that have a
        value.
        notes (`dict[str, int]`): What the loader dropped or assumed, summed (`repeats`, `failed`, …).
        settings (`dict[str, dict]`): What file names and `_`-prefixed records say, by file name.
        warnings (`list[str]`): What looks wrong, each with its remedy.
    """

    groups: int = 0
    queries: int = 0
    sequences: int = 0
    group_sizes: dict[str, float] = field(default_factory=dict)
    pool_sizes: dict[str, float] = field(default_factory=dict)
    lengths: dict[int, int] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)
    survivors: int = 0
    score: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    survivor_spread: dict[str, float] = field(default_factory=dict)
    zero_shot: dict[str, float] = field(default_factory=dict)
    gain_over_zero_shot: float = math.nan
    tied_groups: int = 0
    single_groups: int = 0
    tied_pairs: float = 0.0
    usable_contrast: float = 0.0
    contrast_share: float = math.nan
    columns: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON; unknown numbers are None."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Group:
    """The numbers of one row that the report is made from."""

    query_id: int
    pool: int
    lengths: np.ndarray
    scores: np.ndarray
    survived: np.ndarray
    zero_shot: float
    gains: bool

    @property
    def spread(self) -> float:
        return float(self.scores.std())

    def equal(self) -> float:
        """Largest difference of scores that counts as none."""
        return TIE_EPSILON * float(np.abs(self.scores).max())

    @property
    def tied(self) -> bool:
        return float(np.ptp(self.scores)) <= self.equal()


def inspect_log(dataset: Iterable[Mapping[str, Any]], store: EmbeddingStore | None = None) -> LogReport:
    """Health report of a dataset of groups, also of a streaming one.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            Groups, from [`load_beams`].
        store (`EmbeddingStore`, *optional*):
            Embeddings of the log's rows: ids without a row, and rows with NaN or infinity, become warnings.

    Example:

    ```python
    >>> from lever_grpo.data import inspect_log, load_sample
    >>> report = inspect_log(load_sample("country_facts").load("heldout", shots=2))
    >>> report.groups, report.group_sizes["max"], report.lengths, report.warnings
    (60, 240, {2: 14400}, [])

    ```
    """
    report = LogReport(settings=log_metadata(dataset))
    notes: Counter[str] = Counter({name: 0 for name in NOTES})
    lengths: Counter[int] = Counter()
    sources: Counter[str] = Counter()
    columns: dict[str, list[np.ndarray]] = {}
    groups: list[_Group] = []
    missing: set[int] = set()
    for row in dataset:
        sizes = np.array([len(sequence) for sequence in row["sequences"]])
        groups.append(
            _Group(
                row["query_id"],
                len(row["candidate_ids"]),
                sizes,
                np.array(row["scores"], dtype=np.float64),
                np.array(row["survived"], dtype=bool),
                float("nan") if row.get("zero_shot") is None else row["zero_shot"],
                gains=bool(row["notes"]["marginal"]) or any(map(len, row["shot_scores"])),
            )
        )
        lengths.update(sizes.tolist())
        sources.update(row["source"])
        notes.update({name: int(row["notes"][name]) for name in NOTES})
        for name, values in (row.get("columns") or {}).items():
            filled = [math.nan] * len(sizes) if values is None else values
            columns.setdefault(name, []).append(np.array(filled, dtype=np.float64))
        if store is not None:
            missing.update(i for i in (row["query_id"], *row["candidate_ids"]) if i >= len(store))
    if not groups:
        report.warnings.append("the log has no groups")
        return report

    report.groups = len(groups)
    report.queries = len({group.query_id for group in groups})
    report.sequences = sum(len(group.scores) for group in groups)
    report.group_sizes = _summary([len(group.scores) for group in groups])
    report.pool_sizes = _summary([group.pool for group in groups])
    report.lengths = dict(sorted(lengths.items()))
    report.sources = dict(sources.most_common())
    report.survivors = int(sum(group.survived.sum() for group in groups))
    report.notes = dict(notes)
    report.columns = {name: _column_summary(np.concatenate(values)) for name, values in columns.items()}
    _add_scores(report, groups)
    _add_warnings(report, groups)
    if missing:
        report.warnings.append(
            f"{len(missing)} row ids have no embedding (the first: {min(missing)}, rows: {len(store or ())}); "
            "do the embeddings belong to this log's split?"
        )
    for name in store.names if store is not None else ():
        bad = store.non_finite_rows(name)  # type: ignore[union-attr]
        if len(bad):
            report.warnings.append(
                f"embeddings '{name}': NaN or infinity in {len(bad)} rows (the first: {bad[0]}); encode them again"
            )
    return report


def _summary(values: Iterable[float]) -> dict[str, float]:
    array = np.asarray(list(values))
    if not len(array):
        return {}
    numbers = {"min": array.min(), "median": np.median(array), "mean": array.mean(), "max": array.max()}
    return {name: value.item() for name, value in numbers.items()}


def _column_summary(values: np.ndarray) -> dict[str, float]:
    known = values[~np.isnan(values)]
    return {"known": len(known) / len(values), **_summary(known)}


def _add_scores(report: LogReport, groups: list[_Group]) -> None:
    scores = np.concatenate([group.scores for group in groups])
    report.score = {**_summary(scores), "std": float(scores.std())}
    report.spread = _summary(group.spread for group in groups)
    report.survivor_spread = _summary(
        float(group.scores[group.survived].std()) for group in groups if group.survived.sum() > 1
    )
    known = [group for group in groups if not math.isnan(group.zero_shot)]
    if known:
        report.zero_shot = _summary(group.zero_shot for group in known)
        report.gain_over_zero_shot = float(np.concatenate([g.scores > g.zero_shot for g in known]).mean())
    report.single_groups = sum(len(group.scores) == 1 for group in groups)
    report.tied_groups = sum(group.tied for group in groups)
    report.usable_contrast = 1.0 - report.tied_groups / report.groups
    equal_pairs = pairs = 0
    for group in groups:
        # sorted neighbours are enough: what is equal stands together
        steps = np.diff(np.sort(group.scores)) > group.equal()
        runs = np.diff(np.flatnonzero(np.concatenate([[True], steps, [True]])))
        equal_pairs += int((runs * (runs - 1) // 2).sum())
        pairs += len(group.scores) * (len(group.scores) - 1) // 2
    report.tied_pairs = equal_pairs / pairs if pairs else 0.0
    total = float(((scores - scores.mean()) ** 2).sum())
    inside = sum(float(((group.scores - group.scores.mean()) ** 2).sum()) for group in groups)
    report.contrast_share = inside / total if total > 0 else math.nan


def _add_warnings(report: LogReport, groups: list[_Group]) -> None:
    warn, notes, n = report.warnings.append, report.notes, report.groups
    reversed_reason = _looks_reversed(report, groups)
    if reversed_reason:
        warn(f"looks reversed: {reversed_reason}; if the scorer kept the worst, load with higher_is_better=False")
    if notes["marginal"]:
        warn(
            f"looks marginal: {notes['marginal']} of {n} groups have several shots but no per-shot scores, "
            "so a score is "
            "the last step's gain over the beam's own parent; use a log with 'shot_scores'"
        )
    if notes["pool_rebuilt"]:
        warn(
            f"{notes['pool_rebuilt']} of {n} pools were rebuilt from the beams (median "
            f"{report.pool_sizes['median']:g} "
            "candidates); pass candidate_pools for the real ones"
        )
    if notes["query_in_pool"]:
        warn(f"{notes['query_in_pool']} pools held the query itself, which was taken out; check the candidate sampler")
    for name, text in (
        ("repeats", "exact repeats of a sequence were dropped"),
        ("failed", "failed or fallback evaluations were dropped"),
        ("invalid", "sequences that repeat a demonstration or hold the query itself were dropped"),
    ):
        if notes[name]:
            warn(f"{notes[name]} {text}")
    if report.tied_groups:
        warn(
            f"{report.tied_groups} of {n} groups have no contrast (all scores equal, "
            f"{report.single_groups} with one sequence)"
        )
    if report.queries < n and len({(g.query_id, *np.unique(g.lengths).tolist()) for g in groups}) < n:
        warn(
            f"{n - report.queries} groups repeat a query at the same length: merge them, as advantages are "
            "relative to a group"
        )
    mixed = sum(len(np.unique(group.lengths)) > 1 for group in groups)
    if mixed and len({group.gains for group in groups}) == 1 and groups[0].gains:
        # absolute scores of different lengths can be compared, gains and last steps cannot be taken for each other
        warn(f"{mixed} groups mix sequences of different lengths; load with shots=… to separate them")
    if report.survivors == report.sequences and report.group_sizes["median"] < SMALL_GROUP:
        warn(
            f"groups hold survivors only (median {report.group_sizes['median']:g} sequences): little "
            "contrast, and no bad sequence to "
            "learn from; log everything the search scored"
        )


def _looks_reversed(report: LogReport, groups: list[_Group]) -> str:
    """Why higher scores look worse, or an empty string. Each test needs a clear majority of the groups that can
    tell."""
    votes = []
    for group in groups:
        kept = group.survived
        length = group.lengths[kept].max() if kept.any() else 0
        rivals = ~kept & (group.lengths == length)
        if kept.any() and rivals.any() and not group.tied:
            votes.append(float(np.median(group.scores[kept]) < np.median(group.scores[rivals])))
    if votes and np.mean(votes) > 0.5:
        return f"survivors score below what the search dropped in {sum(votes):g} of {len(votes)} groups"
    best = [group for group in groups if group.gains and not group.tied]
    worse = sum(float(group.scores.max()) < 0 for group in best)
    if best and worse > 0.5 * len(best):
        return f"even the best gain is negative in {worse} of {len(best)} groups"
    ranked = [group for group in groups if group.survived.all() and len(group.scores) > 2 and not group.tied]
    rising = sum(bool((np.diff(group.scores) >= 0).all()) for group in ranked)
    if len(ranked) > 4 and rising > 0.9 * len(ranked):
        return (
            f"beams are sorted from the lowest score up in {rising} of {len(ranked)} groups; files put the best first"
        )
    return ""


def print_report(report: LogReport, title: str = "Beam log", console: Console | None = None) -> None:
    """Print a report as tables; warnings last.

    Example:

    ```python
    >>> from lever_grpo.data import LogReport, print_report
    >>> print_report(LogReport(groups=1, queries=1, sequences=5), title="tiny")  # doctest: +ELLIPSIS
    tiny...

    ```
    """
    console = console or Console()
    table = Table(title=escape(printable(title)), show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()

    def line(name: str, text: str) -> None:
        if text:
            table.add_row(escape(printable(name)), escape(printable(text)))

    for file, settings in report.settings.items():
        line(f"settings of {file}" if len(report.settings) > 1 else "settings", json.dumps(settings))
    line(
        "groups",
        f"{report.groups} of {report.queries} queries, {report.sequences} sequences, {report.survivors} survivors",
    )
    line("group size", _show(report.group_sizes))
    line("pool size", _show(report.pool_sizes))
    line("shots", ", ".join(f"{length}: {count} sequences" for length, count in report.lengths.items()))
    line("source", ", ".join(f"{name}: {count}" for name, count in report.sources.items()))
    line("score", _show(report.score))
    line("spread in a group", _show(report.spread))
    line("… among survivors", _show(report.survivor_spread))
    line("zero-shot", _show(report.zero_shot))
    if not math.isnan(report.gain_over_zero_shot):
        line("better than zero-shot", f"{report.gain_over_zero_shot:.1%} of the sequences")
    line("usable contrast", f"{report.usable_contrast:.1%} of the groups ({report.tied_groups} tied)")
    line("tied pairs", f"{report.tied_pairs:.1%} inside groups")
    if not math.isnan(report.contrast_share):
        line("variance in groups", f"{report.contrast_share:.1%} of all")
    for name, values in report.columns.items():
        line(f"reward '{name}'", f"{_show(values)}")
    line("dropped or assumed", ", ".join(f"{name}: {count}" for name, count in report.notes.items() if count))
    console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}", highlight=False, soft_wrap=True)
    if not report.warnings:
        console.print("no warnings", style="green")


def _show(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in values.items())
