"""Numbers at the edge: logs of extreme scores by name, and hypothesis strategies for what the objectives are given."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor


NAN, INF = math.nan, math.inf
LARGEST = 2.0**125  # 4e37: the objectives take scores up to a quarter of the end of float32
GROUPS, BEAMS, SHOTS, POOL = 2, 3, 2, 4
FILLERS = (NAN, INF, -INF, 3e38)  # what a masked entry may hold
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """What is done to each row of a log, and which share of its groups has no contrast left."""

    change: Callable[[dict[str, Any], int], dict[str, Any]]
    tied: float


CASES: dict[str, Case] = {}


def case(tied: float) -> Callable:
    def add(change: Callable[[dict[str, Any], int], dict[str, Any]]) -> Callable:
        CASES[change.__name__] = Case(change, tied)
        return change

    return add


def scored(row: dict[str, Any], scores: list[float]) -> dict[str, Any]:
    return {**row, "scores": scores}


# powers of two near 1e-30 and 1e30, so that what comes of them must be the same bit for bit


@case(tied=0.0)
def tiny(row, number):
    return scored(row, [score * 2.0**-100 for score in row["scores"]])


@case(tied=0.0)
def huge(row, number):
    return scored(row, [score * 2.0**100 for score in row["scores"]])


@case(tied=0.0)
def a_scale_for_each_group(row, number):
    return scored(row, [score * 10.0 ** (-30, 0, 30)[number % 3] for score in row["scores"]])


@case(tied=0.0)
def a_scale_for_each_beam(row, number):
    return scored(row, [score * 10.0 ** (-30, 0, 30)[i % 3] for i, score in enumerate(row["scores"])])


@case(tied=0.0)
def as_far_apart_as_can_be(row, number):
    return scored(row, [LARGEST if i % 2 else -LARGEST for i in range(len(row["scores"]))])


@case(tied=0.0)
def subnormal(row, number):
    return scored(row, [1e-40 * (i + 1) for i in range(len(row["scores"]))])


@case(tied=1.0)
def below_float32(row, number):
    return scored(row, [1e-60 * score for score in row["scores"]])


@case(tied=1.0)
def all_equal(row, number):
    return scored(row, [0.3] * len(row["scores"]))


@case(tied=1.0)
def all_equal_and_huge(row, number):
    return scored(row, [-1e30] * len(row["scores"]))


@case(tied=1.0)
def all_zero(row, number):
    return scored(row, [-0.0 if i % 2 else 0.0 for i in range(len(row["scores"]))])


@case(tied=0.5)
def every_second_group_equal(row, number):
    return all_equal(row, number) if number % 2 else row


@case(tied=1.0)
def one_beam(row, number):
    lists = {name: row[name][:1] for name in ("sequences", "scores", "survived")}
    return {**row, **lists, "columns": {name: values[:1] for name, values in row["columns"].items()}}


@case(tied=0.5)
def every_second_group_of_one_beam(row, number):
    return one_beam(row, number) if number % 2 else row


@case(tied=0.5)
def every_second_group_without_beams(row, number):
    """No reader lets such a row through; a data set of other origin may have one."""
    empty: dict[str, Any] = {name: [] for name in ("sequences", "scores", "survived")}
    return {**row, **empty, "columns": {name: [] for name in row["columns"]}} if number % 2 else row


@case(tied=0.0)
def rounded_to_float16(row, number):
    return scored(row, np.array(row["scores"], dtype=np.float16).astype(float).tolist())


@case(tied=0.0)
def rounded_to_bfloat16(row, number):
    return scored(row, torch.tensor(row["scores"]).bfloat16().tolist())


@case(tied=1.0)
def rounded_until_they_tie(row, number):
    close = torch.tensor([0.001 * score - 3.0 for score in row["scores"]])
    return scored(row, (close.bfloat16() + 0.0).tolist())


@case(tied=0.0)
def one_far_from_the_rest(row, number):
    return scored(row, [1e30, *row["scores"][1:]])


# ---------------------------------------------------------------- strategies


@st.composite
def score_groups(draw) -> tuple[Tensor, Tensor]:
    """Scores (B, G) of any float32 or of one scale, tied or not; which count (none, one, some); anything elsewhere."""
    ends = st.sampled_from([LARGEST, -LARGEST, 1e30, 1e-30, 1e-45, 0.0, -0.0])
    anywhere = ends | st.floats(-LARGEST, LARGEST, width=32)
    ordinary = st.floats(-1, 1, width=32)
    rows = []
    for _ in range(GROUPS):
        kind = draw(st.sampled_from(["one scale", "any scale", "tied"]))
        values = draw(st.lists(anywhere if kind == "any scale" else ordinary, min_size=BEAMS, max_size=BEAMS))
        exponent = draw(st.sampled_from([-30, -8, 0, 8, 30])) if kind != "any scale" else 0
        values = values[:1] * BEAMS if kind == "tied" else values
        rows.append([value * 10.0**exponent for value in values])
    counted = draw(st.sampled_from([0, 1, BEAMS - 1, BEAMS]))
    mask = torch.arange(BEAMS).expand(GROUPS, -1) < torch.tensor([[counted], [draw(st.integers(0, BEAMS))]])
    return torch.where(mask, torch.tensor(rows), draw(st.sampled_from(FILLERS))), mask


@dataclass
class Steps:
    """Logits (B, G, S, K) of a policy and its reference, and what of them is read."""

    logits: Tensor  # a leaf
    reference: Tensor
    available: Tensor  # (B, G, S, K) one candidate at least, and what was picked
    picks: Tensor  # (B, G, S)
    mask: Tensor  # (B, G, S)
    filler: float

    def distribution(self, logits: Tensor) -> Tensor:
        """Log-probabilities in the type of the logits, as selectors give them, with anything where masked."""
        steps = logits.float().masked_fill(~self.available, -INF).log_softmax(-1).to(logits.dtype)
        return torch.where(self.mask.unsqueeze(-1), steps, self.filler)

    def picked(self, logits: Tensor) -> Tensor:
        """Those of what was picked (B, G, S)."""
        return self.distribution(logits).gather(-1, self.picks.unsqueeze(-1)).squeeze(-1)


@st.composite
def pointer_steps(draw, beam_mask: Tensor, dtype: torch.dtype) -> Steps:
    """Steps whose log-probabilities lie between -2e4 and -0.0."""
    shape = (GROUPS, BEAMS, SHOTS, POOL)
    element = st.sampled_from([0.0, 1.0, -30.0, 200.0, -1e4, 1e4]) | st.floats(-20, 20, width=32)
    logits, reference = (torch.from_numpy(draw(arrays(np.float32, shape, elements=element))) for _ in range(2))
    picks = torch.from_numpy(draw(arrays(np.int64, shape[:-1], elements=st.integers(0, POOL - 1))))
    available = torch.from_numpy(draw(arrays(np.bool_, shape))).scatter(-1, picks.unsqueeze(-1), True)
    lengths = torch.from_numpy(draw(arrays(np.int64, shape[:2], elements=st.integers(1, SHOTS))))
    mask = (torch.arange(SHOTS) < lengths.unsqueeze(-1)) & beam_mask.unsqueeze(-1)
    leaf = logits.to(dtype).requires_grad_()
    return Steps(leaf, reference.to(dtype), available, picks, mask, draw(st.sampled_from(FILLERS[:3])))
