"""Prompts of a language model laid out side by side, so that nothing is computed twice.

The sequences that a search asks about share most of their tokens: five parents meet the same fifteen candidates, in
front of the same query. So a call is sorted by its tokens and laid out as trees. A row of a batch holds many prompts,
each beginning that some of them share stands in it once, and the attention mask lets a token see its own prompt only:

    Q a A x  Q q A   Q r A   Q b A y  Q q A        tokens of a row
    0 1 2 3  4 5 6   4 5 6   0 1 2 3  4 5 6        their positions
    demo a   query q query r demo b   query q

Nothing is padded, nothing is computed twice, and no cache of keys and values has to be kept. Models that cannot be
asked like this (tried once, at construction) get sequences of about one length in padded batches instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


ROW_LENGTH = 256  # tokens of a row of trees: attention costs more in longer rows, shorter ones share less


@dataclass(frozen=True)
class Job:
    """What is asked: the log-probabilities of `answer` after `prompt`, or (no answer) what comes next, in tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads: its last output is about the answer's last token."""
        return self.prompt + self.answer[:-1]

    @property
    def outputs(self) -> int:
        """How many outputs, counted from the last, are asked for."""
        return max(1, len(self.answer))


@dataclass
class Row:
    """A row of a batch: sequences of tokens side by side, equal beginnings once."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)  # the first place that does not see the token, of those after it
    jobs: list[tuple[Job, list[int]]] = field(default_factory=list)  # with the places of the outputs asked for

    def __len__(self) -> int:
        return len(self.tokens)


def single_row(job: Job) -> Row:
    """A row with nothing else in it."""
    length = len(job.inputs)
    places = list(range(length))
    return Row(list(job.inputs), places, [length] * length, [(job, places[length - job.outputs :])])


def tree_rows(jobs: Iterable[Job], row_length: int) -> Iterator[Row]:
    """Rows of about `row_length` tokens in which jobs that begin alike share their beginning."""
    row = Row()
    path: list[int] = []  # where in the row the tokens of the last job are
    for job in sorted(jobs, key=lambda job: job.inputs):
        ids, shared = job.inputs, 0
        for place, token in zip(path, ids, strict=False):
            if row.tokens[place] != token:
                break
            shared += 1
        if row.tokens and len(row) + len(ids) - shared > row_length:
            yield row
            row, path, shared = Row(), [], 0
        for place in path[shared:]:  # what follows does not see the rest of the last job
            row.ends[place] = len(row)
        path = path[:shared] + list(range(len(row), len(row) + len(ids) - shared))
        row.tokens.extend(ids[shared:])
        row.positions.extend(range(shared, len(ids)))
        row.ends.extend([2**31] * (len(ids) - shared))
        row.jobs.append((job, path[len(ids) - job.outputs :]))
    if row.jobs:
        yield row


def batches_by_length(items: Iterable[Any], length: Callable[[Any], int], budget: int) -> Iterator[list[Any]]:
    """Batches of items of about one length that take at most `budget` tokens when padded, the longest first."""
    ordered = sorted(items, key=length, reverse=True)
    while ordered:
        count = max(1, budget // length(ordered[0]))
        yield ordered[:count]
        ordered = ordered[count:]


def pad_rows(rows: list[list[int]], rest: Tensor) -> Tensor:
    """(B, L): each row, continued as `rest` is."""
    padded = rest.repeat(len(rows), 1)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.tensor(row)
    return padded
