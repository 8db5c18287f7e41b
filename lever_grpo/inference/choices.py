"""Choices of selectors on logged queries, and the baselines that they are held against."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from ..data import DataCollatorForBeams, DataCollatorForRawBeams, fully_scored
from ..metrics import (
    calibration_error,
    expected_reward,
    oracle_reward,
    random_reward,
    rank_correlation,
    score_percentile,
)
from ..models import SelectorModel
from ..report import MethodResult


CORRECT_COLUMNS = ("correct", "vqa_correct")
POOL_INPUTS = ("query_embeds", "candidate_embeds", "candidate_indices", "candidate_mask")
FORWARD_INPUTS = (*POOL_INPUTS, "sequences", "sequence_mask")


@torch.no_grad()
def choose(
    selector: SelectorModel,
    dataset: Dataset,
    collator: DataCollatorForBeams | DataCollatorForRawBeams,
    num_shots: int = 2,
    min_shots: int | None = None,
    batch_size: int = 64,
) -> NDArray[np.int64]:
    """
    The greedy choice of a selector for every query of a data set.

    Args:
        selector ([`SelectorModel`]):
            The policy; it is left in evaluation mode.
        dataset (`datasets.Dataset`):
            Rows of [`load_beams`].
        collator ([`DataCollatorForBeams`] or [`DataCollatorForRawBeams`]):
            Makes batches of rows.
        num_shots (`int`, *optional*, defaults to `2`):
            Number S of demonstrations, of a selector that may stop the most.
        min_shots (`int`, *optional*, defaults to `num_shots`):
            The fewest of a selector that may stop.
        batch_size (`int`, *optional*, defaults to `64`):
            Queries per batch.

    Returns:
        `NDArray` of shape `(Q, S)`: pool positions in search order, -1 behind the end of a short sequence.

    Example:

    ```python
    >>> from lever_grpo import DataCollatorForBeams, PointerSelector, PointerSelectorConfig, load_sample
    >>> from lever_grpo.inference import choose

    >>> sample = load_sample("country_facts")
    >>> collator = DataCollatorForBeams(sample.store, ("question",), ("question",))
    >>> similarity = PointerSelector(PointerSelectorConfig(embed_dim=384, similarity_prior=True))
    >>> choose(similarity, sample.load("heldout", shots=2).select(range(2)), collator).tolist()  # nearest first
    [[0, 1], [0, 1]]

    ```
    """
    selector.eval()
    picks = []
    for start in range(0, len(dataset), batch_size):
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        inputs = policy_inputs(batch, POOL_INPUTS, selector)
        chosen: Any = selector.select(**inputs, num_shots=num_shots, min_shots=min_shots or num_shots)
        picks.append(chosen.sequences[:, 0].cpu().numpy())  # (B, S)
    return np.concatenate(picks)


def evaluate_selectors(
    selectors: Mapping[str, SelectorModel],
    dataset: Dataset,
    collator: DataCollatorForBeams | DataCollatorForRawBeams,
    num_shots: int = 2,
) -> list[MethodResult]:
    """
    What the choices of several selectors were worth on held-out queries, beside zero-shot, random and the oracle.

    Args:
        selectors (`dict[str, SelectorModel]`):
            Name of the report's row → policy.
        dataset (`datasets.Dataset`):
            Held-out queries. Where **every** sequence of `num_shots` shots was scored, the greedy choice is looked up;
            elsewhere a selector is worth its expected reward within each logged group.
        collator ([`DataCollatorForBeams`] or [`DataCollatorForRawBeams`]):
            Makes batches of rows.
        num_shots (`int`, *optional*, defaults to `2`):
            Number of demonstrations.

    Returns:
        `list[MethodResult]`: `zero_shot` (where the log knows it), `random` (the exact expectation over all
        sequences), the selectors in their order with how their log-probabilities agree with the scores of all logged
        sequences, and `oracle`. They have accuracies if the log knows for every sequence whether its answer is right.
    """
    rows = list(dataset)
    sequences = [row["sequences"] for row in rows]
    scores = [row["scores"] for row in rows]
    columns = [row.get("columns") or {} for row in rows]
    # where some sequences were not judged (`judge="survivors"`), the accuracies of two choices could not be compared
    named = next((name for name in CORRECT_COLUMNS if all(_is_known(column.get(name)) for column in columns)), None)
    correct = [column[named] for column in columns] if named else None

    exact = fully_scored(dataset)
    results = []
    zero_shot = np.array([math.nan if row["zero_shot"] is None else row["zero_shot"] for row in rows])
    if not np.isnan(zero_shot).any():
        results.append(MethodResult("zero_shot", zero_shot))
    results.append(
        MethodResult(
            "random",
            random_reward(scores),
            percentiles=np.full(len(rows), 50.0),
            correct=None if correct is None else np.array([np.mean(values) for values in correct]),
        )
    )
    for name, selector in selectors.items():
        logged = _logged_sequences(selector, dataset, collator)
        if exact:
            picks = choose(selector, dataset, collator, num_shots)
            result = MethodResult.from_picks(name, picks, sequences, scores, correct)
        else:
            result = MethodResult(name, expected_reward(*logged))
        results.append(replace(result, **_agreement(*logged)))
    best = oracle_reward(scores)
    results.append(_oracle(best, scores, correct))
    return results


def _is_known(values: list[float | None] | None) -> bool:
    return values is not None and None not in values


@torch.no_grad()
def _logged_sequences(
    selector: SelectorModel,
    dataset: Dataset,
    collator: DataCollatorForBeams | DataCollatorForRawBeams,
    batch_size: int = 16,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Log-probability and score of every logged sequence, and which are there, (Q, G) each."""
    selector.eval()
    size = max(map(len, dataset["sequences"]))
    batches = []
    for start in range(0, len(dataset), batch_size):
        batch = collator([dataset[i] for i in range(start, min(start + batch_size, len(dataset)))])
        rewards = batch.pop("rewards")["score"]
        mask = batch["sequence_mask"].any(-1)
        inputs = policy_inputs(batch, FORWARD_INPUTS, selector)
        log_probs = selector(**inputs).log_probs.sum(-1).cpu()
        missing = ((0, 0), (0, size - mask.shape[1]))
        batches.append([np.pad(values.numpy(), missing) for values in (log_probs, rewards, mask)])
    log_probs, rewards, mask = map(np.concatenate, zip(*batches, strict=True))
    return log_probs, rewards, mask


def _agreement(*logged: NDArray[Any]) -> dict[str, Any]:
    """What [`_logged_sequences`] says of a policy, for its [`MethodResult`]."""
    found = {"rank_correlation": rank_correlation(*logged), "calibration_error": calibration_error(*logged)}
    return {name: value for name, value in found.items() if math.isfinite(value)}  # no ranks where all scores tie


def policy_inputs(batch: Mapping[str, Any], names: tuple[str, ...], selector: SelectorModel) -> dict[str, Any]:
    """What a selector reads of a batch, on its device; of one that embeds rows itself, with the items."""
    found = {**{name: batch[name] for name in names}, **batch.get("items", {})}
    return {name: value.to(selector.device) for name, value in found.items()}


def _oracle(best: NDArray[np.float64], scores: list[Any], correct: list[Any] | None) -> MethodResult:
    answers = None
    if correct is not None:
        answers = np.array([values[int(np.argmax(group))] for values, group in zip(correct, scores, strict=True)])
    return MethodResult("oracle", best, percentiles=score_percentile(best, scores), correct=answers)
