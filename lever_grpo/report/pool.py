"""Several tasks in one report, in units of each task's random-to-oracle gap."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..metrics.bootstrap import paired_differences, pooled_interval, sign_flip_p_value
from .build import build_report, check_pairs, check_results, to_jsonable
from .results import AGREEMENTS, ORACLE, MethodResult, method_order


def pool_tasks(
    tasks: Mapping[str, Sequence[MethodResult]],
    *,
    random: str = "random",
    oracle: str = ORACLE,
    baseline_pairs: Sequence[tuple[str, str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    sections: Mapping[str, Any] | None = None,
    title: str = "Pooled report",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Any]:
    """
    A report per task and the same numbers pooled over all of them.

    Tasks score on different scales, so every reward is put on its task's own: 0 is the task's mean random choice, 1
    its mean oracle, `(reward − mean random) / (mean oracle − mean random)`. A paired difference is thus the query's
    difference divided by its task's gap, and a pooled mean reward *is* the share of the gap closed. Every query counts
    equally; the resampling is done inside each task ([`~lever_grpo.metrics.pooled_interval`]), and the two means that
    make the scale are taken as known. Methods that some task lacks are reported for their tasks only.

    Args:
        tasks (`Mapping[str, Sequence[MethodResult]]`):
            Per task, the results that [`build_report`] takes; random and oracle must be among them.
        random, oracle, baseline_pairs, settings, sections, title, confidence, resamples, seed:
            As in [`build_report`]; `baseline_pairs` are those of the pooled part.

    Returns:
        `dict`: `tasks.<task>` is a report in the task's own unit; `methods` and `paired` have the same names and keys
        as there and hold the pooled numbers.

    Raises:
        ValueError: If a task lacks random or oracle, or its gap is empty.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, pool_tasks
    >>> def task(scale):
    ...     rows = {"random": [0.0, 0.0], "similarity": [0.5, 0.5], "grpo": [0.6, 0.8], "oracle": [1.0, 1.0]}
    ...     return [MethodResult(name, [scale * x for x in rewards]) for name, rewards in rows.items()]
    >>> report = pool_tasks({"small": task(0.1), "large": task(40.0)})
    >>> round(report["paired"]["grpo_minus_similarity"]["mean"], 6)
    0.2

    ```
    """
    if not tasks:
        raise ValueError("there is no task to pool; pass at least one.")
    options: dict[str, Any] = {"confidence": confidence, "resamples": resamples, "seed": seed}
    reports, by_task = {}, {}
    for task, results in tasks.items():
        by_task[task] = check_results(results)
        names = list(by_task[task])
        if random not in names or oracle not in names:
            raise ValueError(f"task {task!r} has methods {names}; {random!r} and {oracle!r} make its scale: add them.")
        pairs = [pair for pair in baseline_pairs if set(pair) <= set(names)] if baseline_pairs is not None else None
        reports[task] = build_report(
            results, random=random, oracle=oracle, baseline_pairs=pairs, title=task, **options
        )
        if reports[task]["gap"] is None:
            raise ValueError(f"task {task!r}: {reports[task]['notes'][0]}")
    all_names = list(dict.fromkeys(name for by_name in by_task.values() for name in by_name))
    shared = [name for name in all_names if all(name in by_name for by_name in by_task.values())]

    scaled = {
        name: [_on_gap_scale(by_task[task], name, random, reports[task]["gap"]) for task in tasks] for name in shared
    }
    methods = {}
    for name in method_order(shared, oracle):
        interval = pooled_interval(scaled[name], **options)
        methods[name] = {
            "reward": interval._asdict(),
            "n_seeds": max(by_task[task][name].seeds for task in tasks),
            "gap_closed": interval.mean,
            "regret": 1.0 - interval.mean,
        }
        queries = [by_task[task][name].queries for task in tasks]
        for key in ("percentile", "accuracy", "changed_vs_sft", *AGREEMENTS):
            rows = [reports[task]["methods"][name] for task in tasks]
            if all(key in row for row in rows):
                methods[name][key] = float(np.average([row[key] for row in rows], weights=queries))
    paired = {}
    for a, b in check_pairs(scaled, baseline_pairs, random, oracle):
        differences = [paired_differences(x, y) for x, y in zip(scaled[a], scaled[b], strict=True)]
        paired[f"{a}_minus_{b}"] = pooled_interval(differences, **options)._asdict() | {
            "p_value": sign_flip_p_value(differences, resamples=resamples, seed=seed)
        }
    left_out = [name for name in all_names if name not in shared]
    report = {
        "kind": "pooled",
        "title": title,
        "reward_name": "share of the random-to-oracle gap",
        "n_queries": sum(report["n_queries"] for report in reports.values()),
        "n_seeds": max(report["n_seeds"] for report in reports.values()),
        "interval": {"confidence": confidence, "resamples": resamples, "method": "percentile bootstrap"},
        "gap": 1.0,
        "methods": methods,
        "paired": paired,
        "tasks": reports,
        "notes": [f"Not pooled, because some task lacks them: {', '.join(left_out)}."] if left_out else [],
        "settings": settings or {},
        "sections": sections or {},
        "kl_band": None,
        "best_step": None,
        "log_history": [],
    }
    return to_jsonable(report)


def _on_gap_scale(by_name: Mapping[str, MethodResult], name: str, random: str, gap: float) -> NDArray[np.float64]:
    """Rewards with the task's mean random choice at 0 and its mean oracle at 1."""
    return (by_name[name].rewards - by_name[random].rewards.mean()) / gap  # (R, Q)
