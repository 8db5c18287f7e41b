"""The report as text: the same tables for the console and for Markdown."""

import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .results import method_label


@dataclass(frozen=True)
class Table:
    """Heading, column names and cells, the first being text; `tall` puts intervals under means on a console."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    tall: bool = False


def print_report(report: Mapping[str, Any], console: Any = None) -> None:
    """
    Print the report's tables to the terminal; 100 columns are enough.

    Args:
        report (`Mapping`):
            What [`build_report`] or [`pool_tasks`] returned.
        console (`rich.console.Console`, *optional*):
            Where to print; standard output by default.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report, print_report
    >>> report = build_report([MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [2.0, 3.0])])
    >>> print_report(report)  # doctest: +ELLIPSIS
    <BLANKLINE>
    ...

    ```
    """
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    console = console or Console()
    console.print()
    console.print(Text(report["title"], style="bold"))
    console.print(Text(describe(report), style="dim"))
    for table in (*report_tables(report), *section_tables(report)):
        rich_table = RichTable(title=Text(table.title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
        for i, column in enumerate(table.columns):
            rich_table.add_column(Text(_narrow(column)), justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            cells = [cell.replace(" [", "\n[") if table.tall else cell for cell in row]
            rich_table.add_row(*(Text(cell, style=_cell_style(cell)) for cell in cells))
        console.print(rich_table)
    for heading, text in report["sections"].items():
        if isinstance(text, str):
            console.print(Text(heading, style="bold"))
            console.print(Padding(Text(text), (0, 0, 1, 2)))
    for note in report["notes"]:
        console.print(Text(f"Note: {note}", style="yellow"))


def to_markdown(report: Mapping[str, Any], images: Sequence[str] = ()) -> str:
    """
    The report as Markdown.

    Args:
        report (`Mapping`):
            What [`build_report`] or [`pool_tasks`] returned.
        images (`Sequence[str]`, *optional*):
            Names of figures that lie beside the text.

    Example:
    ```python
    >>> from lever_grpo.report import MethodResult, build_report, to_markdown
    >>> text = to_markdown(build_report([MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [2.0, 3.0])]))
    >>> text.splitlines()[0]
    '# Report'

    ```
    """
    parts = [f"# {_as_text(report['title'])}", _as_text(describe(report))]
    captions = {
        "gains.png": "Mean held-out reward and paired differences, with intervals",
        "curves.png": "Training curves, stages shaded",
    }
    parts += [f"## {table.title}\n\n{_markdown_table(table)}" for table in report_tables(report)]
    parts += ["\n".join(f"* {_as_text(note)}" for note in report["notes"])] if report["notes"] else []
    parts += [f"![{captions.get(name, name)}]({name})" for name in images]
    parts += [f"## {table.title}\n\n{_markdown_table(table)}" for table in section_tables(report)]
    parts += [f"## {h}\n\n{_as_text(text)}" for h, text in report["sections"].items() if isinstance(text, str)]
    if report["settings"]:
        parts.append(f"## Settings\n\n```json\n{json.dumps(report['settings'], indent=2, ensure_ascii=False)}\n```")
    return "\n\n".join(parts) + "\n"


def _narrow(heading: str) -> str:
    """A heading on several short lines, so that the numbers set the width of a console column."""
    name, *brackets = re.split(r" (?=[\[(])", heading)
    return "\n".join([*textwrap.wrap(name, 12), *brackets])


def describe(report: Mapping[str, Any]) -> str:
    """What was measured, on how many queries and seeds, and what the intervals are."""
    interval = report["interval"]
    seeds = report["n_seeds"]
    resampled = "queries" if seeds == 1 else "queries and, for methods with several seeds, of the seeds"
    pooled = report["kind"] == "pooled"
    where = f" of {len(report['tasks'])} tasks ({', '.join(report['tasks'])})" if pooled else ""
    unit = (
        "Rewards are in units of each task's gap: 0 = its mean random choice, 1 = its mean oracle. "
        if pooled
        else f"Reward: {report['reward_name']}, higher is better. "
    )
    return (
        f"{report['n_queries']} held-out queries{where}, {seeds} seed{'s' if seeds > 1 else ''}. {unit}"
        f"Intervals: {100 * interval['confidence']:g} % {interval['method']}, {interval['resamples']:,} resamples of "
        f"the {resampled}{', within each task' if pooled else ''}."
    )


def report_tables(report: Mapping[str, Any]) -> list[Table]:
    """The tables of methods, of how their log-probabilities fit the log, of paired differences, and by task."""
    tables = [_methods_table(report)]
    if report["kind"] == "pooled":
        tables.append(_gap_by_task_table(report))
    if any("calibration_error" in row for row in report["methods"].values()):
        tables.append(_log_table(report))
    if report["paired"]:
        tables.append(_paired_table(report))
        if report["kind"] == "pooled":
            tables.append(_paired_by_task_table(report))
    return tables


def section_tables(report: Mapping[str, Any]) -> list[Table]:
    """The extra sections that are lists of flat dictionaries."""
    tables = []
    for heading, rows in report["sections"].items():
        if isinstance(rows, str):
            continue
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(
                f"section {heading!r} is a {type(rows).__name__}; expected a text or a list of flat dictionaries."
            )
        columns = list(dict.fromkeys(key for row in rows for key in row))
        tables.append(Table(heading, columns, [[_cell(row.get(key)) for key in columns] for row in rows]))
    return tables


def _methods_table(report: Mapping[str, Any]) -> Table:
    methods = report["methods"]
    digits = digits_of(report["gap"] or max(abs(row["reward"]["mean"]) for row in methods.values()))
    extra = {
        "gap_closed": ("gap closed", lambda x: f"{x:.3f}"),
        "percentile": ("percentile", lambda x: f"{x:.1f}"),
        "accuracy": ("accuracy", lambda x: f"{x:.3f}"),
        "changed_vs_sft": ("changed vs SFT", lambda x: f"{100 * x:.1f} %"),
    }
    present = [key for key in extra if any(row.get(key) is not None for row in methods.values())]
    rows = [
        [method_label(name), interval_text(row["reward"], digits)]
        + [extra[key][1](row[key]) if row.get(key) is not None else "-" for key in present]
        + [str(row["n_seeds"])]
        for name, row in methods.items()
    ]
    columns = [
        "method",
        f"mean reward [{percent_text(report)} interval]",
        *(extra[key][0] for key in present),
        "seeds",
    ]
    return Table("What was chosen for the held-out queries", columns, rows)


def _log_table(report: Mapping[str, Any]) -> Table:
    digits = digits_of(report["gap"] or max(abs(row["reward"]["mean"]) for row in report["methods"].values()))
    shown = {"regret": digits, "rank_correlation": 3, "calibration_error": 3}
    rows = [
        [method_label(name)] + [f"{row[key]:.{places}f}" if key in row else "-" for key, places in shown.items()]
        for name, row in report["methods"].items()
    ]
    return Table("Against all logged sequences", ["method", "regret", "rank correlation", "calibration error"], rows)


def _paired_table(report: Mapping[str, Any]) -> Table:
    digits = digits_of(report["gap"] or max(abs(row["mean"]) for row in report["paired"].values()))
    rows = [
        [pair_label(pair), interval_text(row, digits, signed=True), f"{row['p_value']:.4f}", verdict(row)]
        for pair, row in report["paired"].items()
    ]
    return Table(
        "Paired differences", ["difference", f"mean [{percent_text(report)} interval]", "p", "interval"], rows
    )


def _gap_by_task_table(report: Mapping[str, Any]) -> Table:
    names = list(
        dict.fromkeys([*report["methods"], *(name for t in report["tasks"].values() for name in t["methods"])])
    )
    rows = []
    for name in names:
        cells = [task["methods"].get(name, {}).get("gap_closed") for task in report["tasks"].values()]
        cells.append(report["methods"].get(name, {}).get("gap_closed"))
        rows.append([method_label(name)] + ["-" if cell is None else f"{cell:.3f}" for cell in cells])
    return Table("Share of the gap closed, by task", ["method", *_task_columns(report)], rows)


def _paired_by_task_table(report: Mapping[str, Any]) -> Table:
    rows = []
    for pair, pooled in report["paired"].items():
        cells = [
            interval_text(
                {key: task["paired"][pair][key] / task["gap"] for key in ("mean", "ci_low", "ci_high")}, 3, signed=True
            )
            for task in report["tasks"].values()
        ]
        rows.append([pair_label(pair), *cells, interval_text(pooled, 3, signed=True)])
    columns = ["difference", *_task_columns(report)]
    return Table("Paired differences by task, in units of its gap", columns, rows, tall=True)


def _task_columns(report: Mapping[str, Any]) -> list[str]:
    counts = [*((name, task["n_queries"]) for name, task in report["tasks"].items()), ("pooled", report["n_queries"])]
    return [f"{name} (n = {count})" for name, count in counts]


def pair_label(pair: str) -> str:
    """`grpo_minus_sft` → "GRPO - SFT"."""
    a, _, b = pair.partition("_minus_")
    return f"{method_label(a)} - {method_label(b)}"


def verdict(row: Mapping[str, float]) -> str:
    """On which side of zero the interval lies; only then has the difference been shown."""
    return "above 0" if row["ci_low"] > 0 else "below 0" if row["ci_high"] < 0 else "includes 0"


def interval_text(row: Mapping[str, float], digits: int, signed: bool = False) -> str:
    sign = "+" if signed else ""
    return f"{row['mean']:{sign}.{digits}f} [{row['ci_low']:{sign}.{digits}f}, {row['ci_high']:{sign}.{digits}f}]"


def digits_of(scale: float) -> int:
    """Decimals that show a thousandth of `scale`."""
    return 3 if scale == 0 else min(max(3 - math.floor(math.log10(abs(scale))), 0), 9)


def percent_text(report: Mapping[str, Any]) -> str:
    return f"{100 * report['interval']['confidence']:g} %"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell_style(cell: str) -> str:
    return {"above 0": "green", "below 0": "red"}.get(cell, "")


def _as_text(text: str) -> str:
    """The same without HTML, which Markdown lets through: names of files and of columns may hold some."""
    return text.replace("<", "&lt;")


def _markdown_table(table: Table) -> str:
    rows = [
        [_as_text(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in (table.columns, *table.rows)
    ]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    marks = ["---", *("---:" for _ in table.columns[1:])]
    return "\n".join([lines[0], f"| {' | '.join(marks)} |", *lines[1:]])
