"""A table of sampled groups while training runs: on the console, in a file, and in the trackers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..terminal import printable


CANDIDATE_IDS = "candidate_ids"  # in a batch: the pool of every group, a list of row ids each
SCHEMA = pa.schema(
    {
        "step": pa.int64(),
        "stage": pa.string(),
        "query_id": pa.int64(),
        "sequence": pa.list_(pa.int64()),
        "query": pa.string(),
        "demonstrations": pa.list_(pa.string()),
        "reward": pa.float64(),
        "weight": pa.float64(),
        "advantage": pa.float64(),
        "ratio": pa.float64(),
        "log_prob": pa.float64(),
        "counts": pa.bool_(),
        "clipped": pa.bool_(),
    }
)
LONGEST = 40  # characters of a text that is printed


@dataclass
class CollatorWithCandidateIds:
    """
    Adds the row ids of every pool, `candidate_ids`, to what another collator makes.

    Args:
        data_collator ([`DataCollatorForBeams`]):
            Makes the rest of the batch.
    """

    data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**self.data_collator(rows), CANDIDATE_IDS: [list(row["candidate_ids"]) for row in rows]}


def group_rows(
    inputs: Mapping[str, Any],
    num_groups: int,
    *,
    rewards: Tensor,
    log_probs: Tensor,
    counts: Tensor,
    weights: Tensor | None = None,
    advantages: Tensor | None = None,
    ratios: Tensor | None = None,
    clipped: Tensor | None = None,
    texts: Mapping[int, str] | None = None,
) -> list[dict[str, Any]]:
    """
    One row per sequence of the first groups of a batch, the best reward of each group first. Training shuffles, so the
    first groups of a batch are a sample, and drawing them takes nothing from a random generator.

    Args:
        inputs (`dict[str, Any]`):
            A batch with `query_ids` (B,), `candidate_ids` (the row ids of the B pools), `sequences` and
            `sequence_mask` (B, G, S).
        num_groups (`int`):
            Groups at most.
        rewards, log_probs, counts (`Tensor` of shape `(B, G)`):
            The reward of each sequence, the policy's log-probability of it, and whether it counts in the loss.
        weights, advantages, ratios, clipped (`Tensor` of shape `(B, G)`, *optional*):
            What the loss makes of it. Ratio and clipping are left out where a sequence does not count.
        texts (`dict[int, str]`, *optional*):
            What rows say, by row id; a row that is not among them is named by its id.

    Returns:
        `list[dict[str, Any]]`: the columns of `SCHEMA` from `query_id` on, `None` for what is not known.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo.trainer.group_table import group_rows

    >>> inputs = {"query_ids": torch.tensor([7]), "candidate_ids": [[30, 40]]}
    >>> inputs |= {"sequences": torch.tensor([[[0], [1]]]), "sequence_mask": torch.ones(1, 2, 1, dtype=torch.bool)}
    >>> values = {"rewards": torch.tensor([[0.5, 1.0]]), "log_probs": torch.tensor([[-1.5, -0.25]])}
    >>> best, worst = group_rows(inputs, 1, counts=torch.tensor([[False, True]]), **values)
    >>> best["query_id"], best["sequence"], best["reward"], best["log_prob"], worst["counts"]
    (7, [40], 1.0, -0.25, False)

    ```
    """
    columns = {"reward": rewards, "weight": weights, "advantage": advantages, "ratio": ratios, "log_prob": log_probs}
    columns |= {"counts": counts, "clipped": clipped}
    known = {name: values[:num_groups].tolist() for name, values in columns.items() if values is not None}
    query_ids = inputs["query_ids"][:num_groups].tolist()
    sequences, masks = (inputs[name][:num_groups].tolist() for name in ("sequences", "sequence_mask"))
    rows = []
    for b, query_id in enumerate(query_ids):
        group = []
        for g, (positions, mask) in enumerate(zip(sequences[b], masks[b], strict=True)):
            if any(mask):
                pool = inputs[CANDIDATE_IDS][b]
                picks = [pool[position] for position, real in zip(positions, mask, strict=True) if real]
                row = {"query_id": query_id, "sequence": picks, "query": None, "demonstrations": None}
                if texts:
                    row["query"], *row["demonstrations"] = (texts.get(i, str(i)) for i in (query_id, *picks))
                row |= dict.fromkeys(columns)
                row |= {name: values[b][g] for name, values in known.items()}
                if not row["counts"]:
                    row["ratio"] = row["clipped"] = None
                group.append(row)
        rows += sorted(group, key=lambda row: -row["reward"])
    return rows


def print_groups(rows: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """
    Prints rows of a [`GroupTableCallback`] as a table, with a line under each group. Columns without values are left
    out, and row ids where texts are known; long texts are cut short.

    Args:
        rows (`list[dict[str, Any]]`):
            Rows of one step, at least one.
        console (`rich.console.Console`, *optional*):
            Where to print.
    """
    names, cells = _cells(rows)
    table = Table(title=f"Step {rows[0]['step']}, {rows[0]['stage']}", title_justify="left", collapse_padding=True)
    for name in names:
        table.add_column(name, justify="left" if name in ("sequence", "query", "demonstrations") else "right")
    for i, row in enumerate(cells):
        last = i + 1 == len(rows) or rows[i + 1]["query_id"] != rows[i]["query_id"]
        table.add_row(*map(escape, row), end_section=last)
    (console or Console()).print(table)


def _markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    names, cells = _cells(rows)
    lines = [names, ["---"] * len(names), *([cell.replace("|", "\\|") for cell in row] for row in cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names and texts of the columns that say something, step and stage aside."""
    names = [name for name in SCHEMA.names[2:] if any(row[name] is not None for row in rows)]
    if "query" in names:
        names = [name for name in names if name not in ("query_id", "sequence")]
    return names, [[_text(row[name]) for name in names] for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ("; " if isinstance(value[0], str) else " ").join(map(_text, value))
    if isinstance(value, str):
        return printable(value if len(value) <= LONGEST else value[: LONGEST - 1] + "…")
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class GroupTableCallback(TrainerCallback):
    """
    Every `args.log_groups_steps` steps, shows groups of the step's last batch on the console, writes them to
    `output_dir/groups/groups_<step>.parquet`, and sends them, as `groups`, to those of TensorBoard, trackio and
    Weights & Biases that the trainer reports to. The main process alone does so, with its own groups.

    Args:
        trainer ([`GroupBeamGRPOTrainer`]):
            Whose groups are shown; it leaves them in `rows` when they are `due`.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.rows: list[dict[str, Any]] = []

    def due(self, model: nn.Module) -> bool:
        """Whether the forward pass that now runs is one of a step that is shown."""
        args, state = self.trainer.args, self.trainer.state
        return model.training and state.is_world_process_zero and (state.global_step + 1) % args.log_groups_steps == 0

    def on_step_end(self, args, state, control, **kwargs):
        if not self.rows:
            return
        rows = [{"step": state.global_step, "stage": self.trainer.policy_control.stage, **row} for row in self.rows]
        self.rows = []
        print_groups(rows)
        folder = Path(args.output_dir, "groups")
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), folder / f"groups_{state.global_step:05d}.parquet")
        for tracker in self.trainer.callback_handler.callbacks:
            if isinstance(tracker, TensorBoardCallback):
                tracker.tb_writer.add_text("groups", _markdown(rows), state.global_step)
            elif isinstance(tracker, WandbCallback):
                import wandb

                _log_table(wandb, rows)
            elif isinstance(tracker, TrackioCallback):
                import trackio

                _log_table(trackio, rows)


def _log_table(tracker: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Sends rows to W&B or trackio, whose tables have one interface, at the step that their scalars are plotted by."""
    table = tracker.Table(columns=SCHEMA.names, data=[[row[name] for name in SCHEMA.names] for row in rows])
    tracker.log({"groups": table, "train/global_step": rows[0]["step"]})
