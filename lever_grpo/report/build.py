"""The report as a dictionary: every number that the tables and figures show, computed here and nowhere else."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..metrics.bootstrap import mean_interval, paired_differences, sign_flip_p_value
from ..metrics.selection import changed_share, gap_closed, regret
from .results import AGREEMENTS, BASELINES, ORACLE, TRAINED, MethodResult, method_order


# What a trained method is compared with, the start of its training first.
COMPARED_WITH = ("sft", "similarity", "similarity_all", "random")


def build_report(
    results: Sequence[MethodResult],
    *,
    random: str = "random",
    oracle: str = ORACLE,
    baseline_pairs: Sequence[tuple[str, str]] | None = None,
    log_history: Sequence[Mapping[str, Any]] | None = None,
    settings: Mapping[str, Any] | None = None,
    sections: Mapping[str, Any] | None = None,
    title: str = "Report",
    reward_name: str = "reward",
    kl_band: tuple[float, float] | None = (0.01, 0.1),
    best_step: int | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Everything a report says, as a JSON-able dictionary.

    A method that was not run is absent. `methods.<name>` holds `reward.{mean,ci_low,ci_high}`, `n_seeds`, and, where
    they are known, `gap_closed`, `regret` (mean shortfall from the oracle's reward), `percentile`, `accuracy`,
    `changed_vs_sft`, `rank_correlation`, `calibration_error`; `paired.<a>_minus_<b>` holds
    `{mean,ci_low,ci_high,p_value}`. See [`~lever_grpo.metrics.mean_interval`] for what is resampled.

    Args:
        results (`Sequence[MethodResult]`):
            One result per method, all on the same held-out queries.
        random (`str`, *optional*, defaults to `"random"`), oracle (`str`, *optional*, defaults to `"oracle"`):
            The methods that span the gap of `gap_closed`. Without both of them it is absent; `None` with a note where
            the gap is empty.
        baseline_pairs (`Sequence[tuple[str, str]]`, *optional*):
            Pairs (a, b) whose difference a − b is wanted. By default [`default_pairs`].
        log_history (`Sequence[Mapping]`, *optional*):
            The trainer's log (`trainer.state.log_history`, the runs of several trainers one after the other), for the
            curves. Values that are not finite are kept as null and counted in a note.
        settings (`Mapping`, *optional*):
            What a reader needs to repeat the run; printed as it is.
        sections (`Mapping`, *optional*):
            Further sections of `report.md` and the console by heading: a text, or a list of flat dictionaries, which
            becomes a table.
        title (`str`, *optional*, defaults to `"Report"`):
            Heading.
        reward_name (`str`, *optional*, defaults to `"reward"`):
            What the reward is, with its unit.
        kl_band (`tuple[float, float]`, *optional*, defaults to `(0.01, 0.1)`):
            Band in which β's controller holds the KL, drawn with the curve.
        best_step (`int`, *optional*):
            Step of the checkpoint that was kept, counted in the last run of `log_history`; marked in the curves.
        confidence, resamples, seed:
            As in [`~lever_grpo.metrics.mean_interval`].

    Returns:
        `dict`: The report; [`write_report`] and [`print_report`] take it.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report
    >>> rows = {"random": [0.0, 0.0, 0.0], "similarity": [1.0, 2.0, 3.0], "grpo": [2.0, 3.0, 4.0], "oracle": [4.0] * 3}
    >>> report = build_report([MethodResult(name, rewards) for name, rewards in rows.items()])
    >>> report["methods"]["grpo"]["gap_closed"]
    0.75
    >>> report["paired"]["grpo_minus_similarity"]
    {'mean': 1.0, 'ci_low': 1.0, 'ci_high': 1.0, 'p_value': 0.25}

    ```
    """
    by_name = check_results(results)
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    notes: list[str] = []
    gap = None
    if random in by_name and oracle in by_name:
        try:
            gap_closed(by_name[random].rewards, by_name[random].rewards, by_name[oracle].rewards)
            gap = float(by_name[oracle].rewards.mean() - by_name[random].rewards.mean())
        except ValueError as error:
            notes.append(f"gap_closed is undefined: {error}")
    methods = {}
    for name in method_order(list(by_name), oracle):
        result = by_name[name]
        row: dict[str, Any] = {"reward": mean_interval(result.rewards, **options)._asdict(), "n_seeds": result.seeds}
        if random in by_name and oracle in by_name:
            ends = by_name[random].rewards, by_name[oracle].rewards
            row["gap_closed"] = None if gap is None else gap_closed(result.rewards, *ends)
        if oracle in by_name:
            row["regret"] = float(regret(result.rewards, list(by_name[oracle].rewards.T)).mean())
        methods[name] = row | secondary_metrics(result, by_name.get("sft"))
    paired = {}
    for a, b in check_pairs(by_name, baseline_pairs, random, oracle):
        differences = paired_differences(by_name[a].rewards, by_name[b].rewards)  # (R, Q)
        paired[f"{a}_minus_{b}"] = mean_interval(differences, **options)._asdict() | {
            "p_value": sign_flip_p_value(differences, resamples=resamples, seed=seed)
        }
    history, dropped = _finite_history(log_history or [])
    if dropped:
        notes.append(
            f"{dropped} logged value(s) were not finite; they are null in log_history and gaps in the curves."
        )
    report = {
        "kind": "task",
        "title": title,
        "reward_name": reward_name,
        "n_queries": next(iter(by_name.values())).queries,
        "n_seeds": max(result.seeds for result in by_name.values()),
        "interval": {"confidence": confidence, "resamples": resamples, "method": "percentile bootstrap"},
        "gap": gap,
        "methods": methods,
        "paired": paired,
        "notes": notes,
        "settings": settings or {},
        "sections": sections or {},
        "kl_band": kl_band,
        "best_step": best_step,
        "log_history": history,
    }
    return to_jsonable(report)


def default_pairs(names: Sequence[str], random: str = "random", oracle: str = ORACLE) -> list[tuple[str, str]]:
    """
    Every trained method minus the stage before it, SFT, the similarity baselines and random; itself and absent ones
    left out.

    Trained is whatever is neither a baseline (zero-shot, random, a similarity) nor the oracle. The stages are SFT,
    agreement of answers, RCE and GRPO, those that were run: what each of them gained is its difference to the one
    before.

    Example:
    ```python
    >>> from lever_grpo.report import default_pairs
    >>> default_pairs(["random", "sft", "rce", "grpo"])[2:]
    [('rce', 'random'), ('grpo', 'rce'), ('grpo', 'sft'), ('grpo', 'random')]

    ```
    """
    trained = [name for name in method_order(names, oracle) if name not in {*BASELINES, random, oracle}]
    others = [random if name == "random" else name for name in COMPARED_WITH]
    stages = [name for name in TRAINED if name in names]
    before = {stage: [earlier] for earlier, stage in pairwise(stages)}
    # a stage that follows SFT has it twice
    wanted = {name: dict.fromkeys([*before.get(name, []), *others]) for name in trained}
    return [(a, b) for a, against in wanted.items() for b in against if b in names and a != b]


def check_results(results: Sequence[MethodResult]) -> dict[str, MethodResult]:
    """The results by name; names are unique and all methods answered equally many queries."""
    if not results:
        raise ValueError("there is no result to report; pass at least one MethodResult.")
    by_name = {result.name: result for result in results}
    if len(by_name) < len(results):
        repeated = sorted({r.name for r in results if sum(r.name == other.name for other in results) > 1})
        raise ValueError(f"methods {repeated} are given twice; join the seeds of a method with stack_seeds.")
    queries = {name: result.queries for name, result in by_name.items()}
    if len(set(queries.values())) > 1:
        raise ValueError(f"methods answered unequal numbers of queries: {queries}; use one held-out file for all.")
    return by_name


def check_pairs(
    names: Mapping[str, Any], pairs: Sequence[tuple[str, str]] | None, random: str, oracle: str
) -> list[tuple[str, str]]:
    """The pairs to compare, all of methods that are there."""
    chosen = default_pairs(list(names), random, oracle) if pairs is None else list(pairs)
    for a, b in chosen:
        if a not in names or b not in names:
            raise ValueError(f"baseline_pairs has ({a!r}, {b!r}); the methods are {list(names)}: name two of these.")
    return chosen


def secondary_metrics(result: MethodResult, sft: MethodResult | None) -> dict[str, float]:
    """Percentile, accuracy, share of changed choices and agreement with the log, each where it is known."""
    row = {}
    if result.percentiles is not None:
        row["percentile"] = float(result.percentiles.mean())
    if result.correct is not None:
        row["accuracy"] = float(result.correct.mean())
    if sft is not None and sft.picks is not None and result.picks is not None and result.name != "sft":
        row["changed_vs_sft"] = changed_share(result.picks, sft.picks)
    for key in AGREEMENTS:
        values = getattr(result, key)
        if values is not None:
            row[key] = float(values.mean())
    return row


def to_jsonable(value: Any, path: str = "report") -> Any:
    """
    `value` with numpy types, paths and tuples as plain JSON types. NaN and infinities have no JSON form and are an
    error.

    Example:
    ```python
    >>> import numpy as np
    >>> from lever_grpo.report.build import to_jsonable
    >>> to_jsonable({"a": np.float32(0.5), "b": (1, 2)})
    {'a': 0.5, 'b': [1, 2]}

    ```
    """
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot hold; leave the key out, or pass None.")
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): to_jsonable(item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_jsonable(item, f"{path}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{path} is of type {type(value).__name__}; expected numbers, texts, lists or dictionaries.")


def _finite_history(history: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """The log with null for what is not finite (a gradient norm may overflow in a step), and how often that was."""
    entries, dropped = [], 0
    for entry in history:
        clean = {}
        for key, value in entry.items():
            value = value.item() if isinstance(value, np.generic) else value
            if isinstance(value, float) and not math.isfinite(value):
                value, dropped = None, dropped + 1
            clean[key] = value
        entries.append(clean)
    return entries, dropped
