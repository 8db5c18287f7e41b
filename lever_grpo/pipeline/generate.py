"""From a task and a frozen model to a beam log, in shards, so that no query is lost or asked twice.

The output folder holds the log, `failures.json` and `manifest.json`, which comes last and says that the log is whole;
and what a run needs to go on (`generate_folder`).
"""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from ..atomic import one_run
from ..scorers import Scorer
from .frozen_model import load_rows, make_scorer
from .generate_arguments import GenerateArguments, parse_generate
from .generate_folder import agree, prepare, read_pools, write_json, write_pools
from .generate_log import merge
from .generate_shards import search_shards
from .generate_task import choose_queries, make_pools


__all__ = ["GenerateArguments", "GenerationStopped", "generate", "parse_generate"]


class GenerationStopped(RuntimeError):
    """The time is up before the log is whole; the message says how to go on."""


def generate(arguments: GenerateArguments, scorer: Scorer | None = None) -> Path:
    """
    Searches demonstrations for all queries and writes the log; goes on where an earlier call stopped.

    Started by `torchrun` or `accelerate launch`, the shards are divided over the processes; the log is the same.

    Args:
        arguments ([`GenerateArguments`]):
            Task, pools, model and search.
        scorer ([`Scorer`], *optional*):
            A model of one's own, instead of the one that the arguments name.

    Returns:
        `Path`: the log, for [`load_beams`].

    Raises:
        ValueError: if options contradict each other, no query has a pool, or the output folder holds a log of other
            settings.
        [`ScorerError`]: if three batches in a row gave no record; or fewer at the end of a run, and the scorer does
            not answer again what it has answered before.
        [`GenerationStopped`]: if `max_hours` are over; the message says how to go on.

    Example:

    ```python
    >>> from lever_grpo.pipeline.generate import GenerateArguments, generate
    >>> log = generate(GenerateArguments(num_queries=100, output_dir="outputs/emoji"))  # doctest: +SKIP

    ```
    """
    # without a GPU, processes find each other only when they are told so; they wait for the slowest one
    on_cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    with one_run(Path(arguments.output_dir), wanted=state.is_main_process):
        return _generate(arguments, scorer, state)


def _generate(arguments: GenerateArguments, scorer: Scorer | None, state: PartialState) -> Path:
    began = time.monotonic()
    output = Path(arguments.output_dir)
    log = output / arguments.log_name
    rows = {row.id: row for row in load_rows(arguments)}
    if arguments.scorer == "visual_prefix" and all(row.image is None for row in rows.values()):
        raise ValueError("scorer='visual_prefix' reads images, and no row of the task has one; see `load_examples`.")
    queries, candidates = choose_queries(arguments, list(rows.values()))
    batches = [queries[i : i + arguments.batch_queries] for i in range(0, len(queries), arguments.batch_queries)]
    shards = {output / "shards" / f"{index:05d}.jsonl": batch for index, batch in enumerate(batches)}

    if state.is_main_process:
        prepare(arguments, rows)
    state.wait_for_everyone()
    finished = log.exists() and (output / "manifest.json").exists()
    missing = [shard for shard in shards if not shard.exists()]
    if state.is_main_process and missing and not finished and not (output / "pools.jsonl").exists():
        pools, unreadable = make_pools(arguments, rows, queries, candidates)
        if unreadable:
            write_json(output / "unreadable.json", {str(row): reason for row, reason in unreadable.items()})
        write_pools(output / "pools.jsonl", queries, pools)
        shutil.rmtree(output / "cache", ignore_errors=True)  # what the pools were made of
    state.wait_for_everyone()
    if finished:
        return log
    if missing:
        scorer = make_scorer(arguments, state) if scorer is None else scorer
        if state.is_main_process:
            agree(output / "scorer.json", scorer.describe(), "the scorer")
        state.wait_for_everyone()
        pool_of = read_pools(output / "pools.jsonl", queries, rows)
        mine = list(shards)[state.process_index :: state.num_processes]
        todo = {shard: shards[shard] for shard in mine if not shard.exists()}
        search_shards(arguments, scorer, rows, pool_of, todo, began)
    state.wait_for_everyone()
    missing = [shard for shard in shards if not shard.exists()]
    if missing:
        raise GenerationStopped(
            f"stopped after max_hours={arguments.max_hours}: {len(shards) - len(missing)} of {len(shards)} shards of "
            f"{arguments.output_dir} are done. The same command (without --overwrite) goes on from there."
        )
    if state.is_main_process:
        merge(arguments, log, shards)
    state.wait_for_everyone()
    return log
