"""The report as pictures: the training's curves as small multiples, and the gains as a dot plot."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from .results import BASELINES, ORACLE, method_label
from .tables import pair_label


STAGES = ("rce", "grpo_early", "grpo_late")  # what a logged stage 0, 1, 2 is
STAGE_LABELS = {"sft": "SFT", "rce": "RCE", "grpo_early": "early GRPO", "grpo_late": "late GRPO"}
STAGE_COLORS = {"sft": "#e4e4e8", "rce": "#f9e8c4", "grpo_early": "#d9eadf", "grpo_late": "#d6e4f2"}
OTHER_STAGE_COLORS = ("#efe0ee", "#e6e9cf", "#f3ddd6")

TRAIN, VALIDATION, PART, OTHER = "#1f5a93", "#c4512d", "#7a7a85", "#7b4f9d"
METHOD_COLORS = {"sft": "#2a7f62", "rce": "#c98a1b", "grpo": "#1f5a93"}
OTHER_METHOD_COLORS = ("#7b4f9d", "#b03a5b", "#5d6d1e")
SHARED_LABELS = ("train", "validation")
INK, FAINT = "#2b2b33", "#9a9aa5"


@dataclass(frozen=True)
class Series:
    """One line: the first of `keys` that the log has."""

    keys: tuple[str, ...]
    label: str
    color: str
    marker: bool = False


@dataclass(frozen=True)
class Panel:
    """One small plot; `stages` keeps it to some stages, where a quantity means something else in the others."""

    title: str
    series: tuple[Series, ...]
    stages: tuple[str, ...] | None = None
    band: bool = False


PANELS = (
    Panel(
        "Loss, SFT and RCE",
        (Series(("loss",), "train", TRAIN), Series(("eval_loss",), "validation", VALIDATION, marker=True)),
        stages=("sft", "rce"),
    ),
    Panel(
        "Loss, GRPO",
        (
            Series(("loss",), "train", TRAIN),
            Series(("policy_loss",), "of which policy", PART),
            Series(("eval_loss",), "validation", VALIDATION, marker=True),
        ),
        stages=("grpo_early", "grpo_late"),
    ),
    Panel(
        "Expected reward in the logged group",
        (
            Series(("expected_reward", "reward"), "train", TRAIN),
            Series(("eval_expected_reward", "eval_reward"), "validation", VALIDATION, marker=True),
        ),
    ),
    Panel("Reward of the greedy pick", (Series(("eval_greedy_reward",), "validation", VALIDATION, marker=True),)),
    Panel(
        "KL to the reference",
        (Series(("kl",), "train", TRAIN), Series(("eval_kl",), "validation", VALIDATION, marker=True)),
        band=True,
    ),
    Panel("KL weight β", (Series(("beta",), "β", TRAIN),)),
    Panel(
        "Temperature τ",
        (
            Series(("temperature", "tau"), "of the RCE weights", TRAIN),
            Series(("policy_temperature",), "of the policy", OTHER),
        ),
    ),
    Panel(
        "Share of clipped ratios",
        (
            Series(("clip_ratio/low_mean",), "below 1 - ε", OTHER),
            Series(("clip_ratio/high_mean",), "above 1 + ε", PART),
        ),
    ),
    Panel(
        "Entropy of a step",
        (Series(("entropy",), "train", TRAIN), Series(("eval_entropy",), "validation", VALIDATION, marker=True)),
    ),
)


def draw_curves(report: Mapping[str, Any]) -> bytes | None:
    """
    The training's curves over the optimizer's steps, stages shaded, as a PNG; `None` when the log has none of them.

    Logs of several trainers may follow each other: where the step falls, the next run is put behind the one before.
    Lines break where the stage changes, because a loss or a reward of another stage is another quantity. Long train
    lines are drawn faint with their running mean on top.

    Args:
        report (`Mapping`):
            What [`build_report`] returned.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report
    >>> from lever_grpo.report.figures import draw_curves
    >>> log = [{"step": 1, "loss": 2.0, "stage": 0}, {"step": 2, "loss": 1.0, "stage": 0}]
    >>> draw_curves(build_report([MethodResult("random", [0.0, 1.0])], log_history=log))[1:4]
    b'PNG'

    ```
    """
    history, offset = _continuous(report["log_history"])
    panels = [(panel, lines) for panel in PANELS if (lines := _panel_lines(panel, history))]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.3 * columns, 2.5 * rows + 0.9), dpi=130, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    spans = _stage_spans(history)
    colors = _stage_colors(spans)
    last = max(entry["step"] for entry in history)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    for i, (axes, (panel, lines)) in enumerate(zip(grid.flat, panels, strict=False)):
        _style(axes, panel.title)
        for stage, start, end in spans:
            axes.axvspan(start, end, color=colors[stage], linewidth=0, zorder=0)
        band = report["kl_band"] if panel.band else None
        if band:
            axes.axhspan(*band, facecolor="#2a7f62", alpha=0.16, linewidth=0, zorder=1, label="target band")
            for edge in band:
                axes.axhline(edge, color="#2a7f62", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        for series, segments in lines:
            _draw_line(axes, series, segments)
        if report["best_step"] is not None:
            axes.axvline(offset + report["best_step"], color=INK, linewidth=1.0, linestyle=(0, (1, 2)), zorder=2)
        axes.margins(y=0.12)
        if band:
            axes.set_ylim(bottom=0.0, top=max(axes.get_ylim()[1], 1.25 * band[1]))
        axes.set_xlim(0, max(last, 1))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        # The lowest panel of each column carries the axis, also above an empty place of the grid.
        if i + columns >= len(panels):
            axes.tick_params(labelbottom=True)
            axes.set_xlabel("step", fontsize=9, color=INK)
        # Colours mean train and validation everywhere and are explained once, above; only the rest needs words here.
        special = [series.label not in SHARED_LABELS for series, _ in lines]
        if band or (any(special) and len(lines) > 1):
            own = [(h, t) for h, t in zip(*axes.get_legend_handles_labels(), strict=True) if t not in SHARED_LABELS]
            axes.legend(*zip(*own, strict=True), fontsize=7.5, framealpha=0.8, edgecolor="none", borderpad=0.3)
    handles: list[Any] = [Patch(color=colors[stage], label=STAGE_LABELS.get(stage, stage)) for stage in colors]
    drawn = {series.label: series for _, lines in panels for series, _ in lines if series.label in SHARED_LABELS}
    handles += [
        Line2D([], [], color=s.color, linewidth=1.6, marker="o" if s.marker else None, markersize=3.5, label=label)
        for label, s in drawn.items()
    ]
    if report["best_step"] is not None:
        handles.append(Line2D([], [], color=INK, linewidth=1.0, linestyle=(0, (1, 2)), label="checkpoint kept"))
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9, frameon=False)
    return _png(figure)


def draw_gains(report: Mapping[str, Any]) -> bytes:
    """
    Mean reward of each method with its interval, and beside it the paired differences, as a PNG.

    A zero-shot row far below the others is drawn as an arrow with its value, so that it does not squeeze them
    together.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report
    >>> from lever_grpo.report.figures import draw_gains
    >>> draw_gains(build_report([MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [2.0, 3.0])]))[1:4]
    b'PNG'

    ```
    """
    methods, paired = report["methods"], report["paired"]
    colors = method_colors(methods)
    height = 1.3 + 0.36 * max(len(methods), len(paired))
    figure = Figure(figsize=(12.0 if paired else 7.0, max(height, 2.6)), dpi=130, layout="constrained")
    axes = figure.subplots(1, 2 if paired else 1, squeeze=False)[0]
    left = axes[0]
    _style(left, "Mean reward on held-out queries")
    off_scale = off_scale_methods(methods)
    ends = [x for name, row in methods.items() if name not in off_scale for x in row["reward"].values()]
    margin = 0.06 * (max(ends) - min(ends) or 1.0)
    low, high = min(ends) - margin, max(ends) + margin
    beside = left.get_yaxis_transform()  # x in widths of the plot, y in rows
    share = {name: row["gap_closed"] for name, row in methods.items() if row.get("gap_closed") is not None}
    for i, (name, row) in enumerate(methods.items()):
        if name in off_scale:
            left.plot(low, i, marker="<", markersize=6, color=colors[name], clip_on=False, zorder=3)
            text = f"{row['reward']['mean']:.2f}"
            left.annotate(text, (low, i), (9, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        else:
            _draw_dot(left, i, row["reward"], colors[name])
        if name in share:
            left.text(1.02, i, f"{share[name]:.2f}", transform=beside, va="center", fontsize=8.5, color=INK)
    if share:
        left.text(1.02, -0.75, "gap closed", transform=beside, va="bottom", fontsize=8, color=INK)
    left.set_xlim(low, high)
    left.set_xlabel(report["reward_name"], fontsize=9, color=INK)
    _name_rows(left, [method_label(name) for name in methods])
    if paired:
        right = axes[1]
        _style(right, "Paired differences")
        right.axvline(0.0, color=INK, linewidth=1.0, zorder=1)
        previous = None
        for i, (pair, row) in enumerate(paired.items()):
            name = pair.partition("_minus_")[0]
            _draw_dot(right, i, row, colors[name], hollow=row["ci_low"] <= 0.0 <= row["ci_high"])
            if previous not in (None, name):
                right.axhline(i - 0.5, color="#d5d5dc", linewidth=0.8)
            previous = name
        right.set_xlabel(
            f"difference in {report['reward_name']}\n(hollow: the interval includes 0)", fontsize=9, color=INK
        )
        _name_rows(right, [pair_label(pair) for pair in paired])
    return _png(figure)


def _draw_dot(axes: Axes, row: int, interval: Mapping[str, float], color: str, hollow: bool = False) -> None:
    axes.plot([interval["ci_low"], interval["ci_high"]], [row, row], color=color, linewidth=2.0, alpha=0.75, zorder=2)
    face = "white" if hollow else color
    axes.plot(interval["mean"], row, "o", markersize=6.5, color=color, mfc=face, markeredgewidth=1.6, zorder=3)


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first row on top
    axes.grid(axis="x", color="#e6e6ec", linewidth=0.7)
    axes.set_axisbelow(True)


def off_scale_methods(methods: Mapping[str, Any]) -> set[str]:
    """The zero-shot row, when it lies further below the other rows than these are wide."""
    means = [row["reward"]["mean"] for name, row in methods.items() if name != "zero_shot"]
    if "zero_shot" not in methods or len(means) < 2:
        return set()
    below = min(means) - methods["zero_shot"]["reward"]["mean"]
    return {"zero_shot"} if below > max(means) - min(means) > 0.0 else set()


def method_colors(methods: Mapping[str, Any]) -> dict[str, str]:
    others = iter(OTHER_METHOD_COLORS * len(methods))
    colors = {}
    for name in methods:
        plain = INK if name == ORACLE else FAINT if name in BASELINES else METHOD_COLORS.get(name)
        colors[name] = plain or next(others)
    return colors


def _continuous(history: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Entries with a step, runs one behind the other and stages filled in from the run; the last run's offset."""
    runs: list[list[dict[str, Any]]] = [[]]
    offset = previous = 0
    for entry in history:
        if entry.get("step") is None:
            continue
        if entry["step"] < previous:
            offset += previous
            runs.append([])
        previous = entry["step"]
        stage = _stage_name(entry.get("stage")) or (runs[-1][-1]["stage"] if runs[-1] else None)
        runs[-1].append({**entry, "step": entry["step"] + offset, "stage": stage})
    for run in runs:
        # An evaluation before the first step belongs to the stage that it precedes.
        first = next((entry["stage"] for entry in run if entry["stage"]), None)
        for entry in run:
            entry["stage"] = entry["stage"] or first
    return [entry for run in runs for entry in run], offset


def _stage_name(stage: Any) -> str | None:
    """A logged stage as a name. A logging window over a stage's end has a mean such as 0.4: it goes to the nearest."""
    if stage is None or isinstance(stage, str):
        return stage
    return STAGES[min(max(round(stage), 0), len(STAGES) - 1)]


def _stage_spans(history: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """(stage, first step, last step), each from the end of the one before: an entry speaks of the steps up to it."""
    spans: list[tuple[str, float, float]] = []
    for entry in history:
        if entry["stage"] is None:
            continue
        if spans and spans[-1][0] == entry["stage"]:
            spans[-1] = (entry["stage"], spans[-1][1], entry["step"])
        else:
            start = spans[-1][2] if spans else 0
            spans.append((entry["stage"], start, entry["step"]))
    return spans


def _stage_colors(spans: Sequence[tuple[str, float, float]]) -> dict[str, str]:
    others = iter(OTHER_STAGE_COLORS * (len(spans) + 1))
    colors: dict[str, str] = {}
    for stage, _, _ in spans:
        if stage not in colors:
            colors[stage] = STAGE_COLORS.get(stage) or next(others)
    return colors


def _panel_lines(
    panel: Panel, history: Sequence[Mapping[str, Any]]
) -> list[tuple[Series, list[tuple[list[float], list[float]]]]]:
    """The panel's series that the log has, each as one (steps, values) segment per stage."""
    lines = []
    for series in panel.series:
        key = next((key for key in series.keys if any(entry.get(key) is not None for entry in history)), None)
        segments: list[tuple[list[float], list[float]]] = []
        stage: Any = ()
        for entry in history:
            unwanted = panel.stages is not None and entry["stage"] is not None and entry["stage"] not in panel.stages
            if key is None or unwanted or entry.get(key) is None:
                continue
            # Validation points are few, and of one kind in all stages but for the losses: the others stay one line.
            new_kind = entry["stage"] != stage and (panel.stages is not None or not series.marker)
            # Two points at one step are two policies: post-training starts from another than the last stage left.
            if not segments or new_kind or entry["step"] == segments[-1][0][-1]:
                segments.append(([], []))
            stage = entry["stage"]
            segments[-1][0].append(entry["step"])
            segments[-1][1].append(entry[key])
        if segments:
            lines.append((series, segments))
    return lines


def _draw_line(axes: Axes, series: Series, segments: Sequence[tuple[list[float], list[float]]]) -> None:
    label: str | None = series.label
    for steps, values in segments:
        long = len(values) >= 30 and not series.marker
        marker = "o" if series.marker or len(values) == 1 else None
        if long:
            axes.plot(steps, values, color=series.color, linewidth=0.7, alpha=0.35, zorder=3)
            values = _running_mean(values, max(3, len(values) // 15))
        axes.plot(
            steps,
            values,
            color=series.color,
            linewidth=1.6,
            marker=marker,
            markersize=3.5,
            label=label,
            zorder=4,
            clip_on=marker is None,  # a point on the frame, such as the last one, is shown whole
        )
        label = None


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over `window` values, over fewer at the ends."""
    half = window // 2
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)


def _png(figure: Figure) -> bytes:
    # Through Agg itself: pyplot would open a display where there is one and keep the figure in its global state.
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
