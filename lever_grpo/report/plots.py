"""Coordinates of the plots that the HTML page draws itself (`templates/plots.html`), to follow its colours."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.ticker import MaxNLocator

from .figures import PART, method_colors, off_scale_methods
from .results import BASELINES, ORACLE, method_label, method_order
from .tables import pair_label


def plot_shots(reports: Mapping[str, Any]) -> dict[str, Any]:
    """
    Coordinates of a line per method: its mean reward, with its interval, against the number of shots.

    A zero-shot row far below the others is named in `below` in place of a line, as in [`draw_gains`].

    Args:
        reports (`Mapping`):
            What [`build_report`] returned, by number of shots.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report
    >>> from lever_grpo.report.plots import plot_shots
    >>> reports = {n: build_report([MethodResult("sft", [0.0, 1.0]), MethodResult("grpo", [1.0, 1.0])]) for n in "12"}
    >>> [(line["label"], len(line["points"])) for line in plot_shots(reports)["lines"]]
    [('SFT', 2), ('GRPO', 2)]

    ```
    """
    left, right, top, bottom = 60, 560, 16, 316
    names = method_order(list(dict.fromkeys(name for report in reports.values() for name in report["methods"])))
    colors = method_colors({name: None for name in names})
    below = {name for report in reports.values() for name in off_scale_methods(report["methods"])}
    rows = {
        name: [(i, r["methods"][name]["reward"]) for i, r in enumerate(reports.values()) if name in r["methods"]]
        for name in names
        if name not in below
    }
    place, ticks = _axis([x for row in rows.values() for _, interval in row for x in interval.values()], bottom, top)
    slot = (right - left) / len(reports)
    step = min(9.0, 0.7 * slot / len(rows))  # the methods stand side by side, so that no interval hides another
    lines: list[dict[str, Any]] = []
    for j, (name, row) in enumerate(rows.items()):
        shift = (j - (len(rows) - 1) / 2) * step
        points = [
            {"x": round(left + slot * (i + 0.5) + shift, 1)} | {key: place(interval[key]) for key in interval}
            for i, interval in row
        ]
        color = PART if name in BASELINES else colors[name]  # on a screen, FAINT would be too faint for a line
        apart = name in ("zero_shot", ORACLE)
        lines.append({"label": method_label(name), "color": color, "apart": apart, "points": points})
    ends = _spread([line["points"][-1]["mean"] for line in lines], 16.0, top, bottom)
    return {
        "width": right + 40 + 7 * max(len(line["label"]) for line in lines),
        "height": bottom + 50,
        "frame": (left, right, top, bottom),
        "x_ticks": [(round(left + slot * (i + 0.5), 1), shots) for i, shots in enumerate(reports)],
        "y_ticks": ticks,
        "lines": [line | {"end": round(end, 1)} for line, end in zip(lines, ends, strict=True)],
        "below": [method_label(name) for name in names if name in below],
    }


def plot_gains(reports: Mapping[str, Any]) -> dict[str, Any] | None:
    """
    Coordinates of the paired differences with their intervals, a row per pair and a panel per number of shots; `None`
    without pairs.

    Args:
        reports (`Mapping`):
            What [`build_report`] returned, by number of shots.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report
    >>> from lever_grpo.report.plots import plot_gains
    >>> report = build_report([MethodResult("sft", [0.0, 1.0]), MethodResult("grpo", [1.0, 2.0])])
    >>> [row["label"] for row in plot_gains({"1": report, "2": report})["rows"]]
    ['GRPO - SFT']

    ```
    """
    pairs = list(dict.fromkeys(pair for report in reports.values() for pair in report["paired"]))
    if not pairs:
        return None
    colors = method_colors({name: None for report in reports.values() for name in report["methods"]})
    keys = ("mean", "ci_low", "ci_high")
    left, top, line, gap = round(7 * max(len(pair_label(pair)) for pair in pairs) + 16), 30, 24, 24
    width = max(640 / len(reports), 150.0)
    values = [row[key] for report in reports.values() for row in report["paired"].values() for key in keys]
    panels = []
    for i, (shots, report) in enumerate(reports.items()):
        start = round(left + i * width, 1)
        end = round(start + width - gap, 1)
        place, ticks = _axis([0.0, *values], start, end, most=4)
        dots = [
            {key: place(row[key]) for key in keys}
            | {"y": top + line * (pairs.index(pair) + 0.5), "color": colors[pair.partition("_minus_")[0]]}
            | {"hollow": row["ci_low"] <= 0.0 <= row["ci_high"]}
            for pair, row in report["paired"].items()
        ]
        panels.append({"shots": shots, "start": start, "end": end, "zero": place(0.0), "x_ticks": ticks, "dots": dots})
    methods = [pair.partition("_minus_")[0] for pair in pairs]
    rows = [
        {"label": pair_label(pair), "y": top + line * (i + 0.5), "first": i > 0 and methods[i] != methods[i - 1]}
        for i, pair in enumerate(pairs)
    ]
    bottom = top + line * len(pairs)
    size = {"width": round(left + width * len(reports)), "height": bottom + 48, "line": line}
    return size | {"left": left, "top": top, "bottom": bottom, "rows": rows, "panels": panels}


def _axis(
    values: Sequence[float], start: float, end: float, most: int = 6
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """A linear scale that puts the values, and a margin, onto [start, end], and its round ticks."""
    margin = 0.06 * (max(values) - min(values) or 1.0)
    low, high = min(values) - margin, max(values) + margin

    def place(value: float) -> float:
        return round(start + (value - low) / (high - low) * (end - start), 1)

    ticks = MaxNLocator(nbins=most).tick_values(low, high)
    return place, [(place(tick), f"{tick:.4g}") for tick in ticks if low <= tick <= high]


def _spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places moved until they are `gap` apart, in their order and inside [low, high] as far as they fit."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    previous = low - gap
    for i in order:
        previous = moved[i] = max(places[i], previous + gap)
    following = high + gap
    for i in reversed(order):
        following = moved[i] = min(moved[i], following - gap)
    return moved
