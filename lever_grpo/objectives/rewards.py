"""The reward of a beam: columns of the log, properties of the sequence, and their weighted combination.

B queries (groups) in a batch, G sequences in a group, S shots, K candidates in the pool, D embedding width.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .advantages import normalize_rewards_zscore, upcast_half


AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")

# What a preset calls a quantity, and the columns that may hold it, in order of preference.
COLUMN_NAMES = {
    "correct": ("correct", "vqa_correct"),
    "accuracy": ("accuracy", "acc_score", "vqa_acc_score"),
    "gt_prob": ("gt_prob", "vqa_gt_prob"),
    "rel": ("rel", "rel_score", "vqa_rel_score"),
}


class RewardPreset(NamedTuple):
    """
    A reward under a name that users of Lever-Plus files know.

    Args:
        formula (`str`):
            The formula, for people.
        inputs (`tuple[str, ...]`):
            Keys of `COLUMN_NAMES`, in the order in which `compute` takes them.
        compute (`Callable`):
            Gives the reward from the inputs' tensors and the keyword `rel_weight`.

    Example:

    ```python
    >>> REWARD_PRESETS["hard_plus_soft"].formula
    'correct + accuracy'

    ```
    """

    formula: str
    inputs: tuple[str, ...]
    compute: Callable[..., Tensor]


REWARD_PRESETS: dict[str, RewardPreset] = {
    "hard_plus_soft": RewardPreset(
        "correct + accuracy", ("correct", "accuracy"), lambda correct, accuracy, rel_weight: correct + accuracy
    ),
    "hard_plus_soft_v2": RewardPreset(
        "2 * correct + accuracy", ("correct", "accuracy"), lambda correct, accuracy, rel_weight: 2 * correct + accuracy
    ),
    "separated": RewardPreset(
        "2 + accuracy if correct else accuracy",
        ("correct", "accuracy"),
        # NaN stays NaN: an unknown answer is not a wrong one.
        lambda correct, accuracy, rel_weight: torch.where(
            correct.isnan(), correct, torch.where(correct > 0.5, 2 + accuracy, accuracy)
        ),
    ),
    "hard_only": RewardPreset("correct", ("correct",), lambda correct, rel_weight: correct),
    "soft_only": RewardPreset("accuracy", ("accuracy",), lambda accuracy, rel_weight: accuracy),
    "hard01_plus_gtprob": RewardPreset(
        "correct + gt_prob", ("correct", "gt_prob"), lambda correct, gt_prob, rel_weight: correct + gt_prob
    ),
    "hard_plus_gtprob_plus_rel": RewardPreset(
        "correct + gt_prob + rel_weight * (1 - correct) * rel",
        ("correct", "gt_prob", "rel"),
        lambda correct, gt_prob, rel, rel_weight: correct + gt_prob + rel_weight * (1 - correct) * rel,
    ),
}


def _column(columns: Mapping[str, Tensor], names: tuple[str, ...], wanted_by: str) -> Tensor:
    for name in names:
        if name in columns:
            return upcast_half(columns[name])
    available = ", ".join(sorted(columns)) or "none"
    raise ValueError(
        f"{wanted_by} needs the column {' or '.join(repr(name) for name in names)}, the log has: {available}. "
        "Declare the column when the log is loaded, or choose another reward."
    )


def reward_from_columns(
    columns: Mapping[str, Tensor],
    preset_or_weights: str | Mapping[str, float],
    rel_weight: float = 0.1,
) -> Tensor:
    """
    Build the reward from columns of the log.

    Args:
        columns (`Mapping[str, Tensor]`):
            Numeric columns of equal shape, e.g. `(B, G)`.
        preset_or_weights (`str` or `Mapping[str, float]`):
            A name in `REWARD_PRESETS`; the name of one column (`"score"`); or a weight for each column to sum.
        rel_weight (`float`, *optional*, defaults to `0.1`):
            Weight of the relevance of wrong answers in `hard_plus_gtprob_plus_rel`. Raising it shapes failures more.

    Returns:
        `Tensor`: the reward, of the columns' shape. An unknown (NaN) entry that is used stays NaN.

    Raises:
        `ValueError`: if a column is missing, the weights are empty, or shapes differ.

    Example:

    ```python
    >>> import torch
    >>> columns = {"correct": torch.tensor([1.0, 0.0]), "vqa_acc_score": torch.tensor([0.9, 0.3])}
    >>> reward_from_columns(columns, "hard_plus_soft_v2")
    tensor([2.9000, 0.3000])
    >>> reward_from_columns(columns, {"correct": 1.0, "vqa_acc_score": 0.5})
    tensor([1.4500, 0.1500])

    ```
    """
    if isinstance(preset_or_weights, str):
        preset = REWARD_PRESETS.get(preset_or_weights)
        if preset is None:
            known = f"reward {preset_or_weights!r} is no preset ({', '.join(REWARD_PRESETS)}); as a column it"
            return _column(columns, (preset_or_weights,), known)
        inputs = [_column(columns, COLUMN_NAMES[name], f"reward {preset_or_weights!r}") for name in preset.inputs]
        _check_same_shape(dict(zip(preset.inputs, inputs, strict=True)))
        return preset.compute(*inputs, rel_weight=rel_weight)
    if not preset_or_weights:
        raise ValueError("the reward has no weights: name at least one column and its weight.")
    terms = {name: _column(columns, (name,), "the weighted reward") for name in preset_or_weights}
    _check_same_shape(terms)
    # A weight of 0 leaves the column out altogether: 0 * NaN would not.
    first = next(iter(terms.values()))
    used = (weight * terms[name] for name, weight in preset_or_weights.items() if weight != 0)
    return sum(used, torch.zeros_like(first))


def _check_same_shape(tensors: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"rewards of different shapes cannot be combined: {shapes}; all must be (B, G).")


def _demonstrations(candidate_embeds: Tensor, sequences: Tensor, mask: Tensor) -> Tensor:
    """Unit-length embeddings of the picked demonstrations `(B, G, S, D)`, zero where padded."""
    batch = torch.arange(sequences.shape[0], device=sequences.device).view(-1, 1, 1)
    positions = torch.where(mask, sequences, 0)  # padding may hold -1 or anything else
    picked = F.normalize(upcast_half(candidate_embeds), dim=-1)[batch, positions]  # (B, G, S, D)
    return torch.where(mask.unsqueeze(-1), picked, 0.0)


def sequence_coherence(
    query_embeds: Tensor, candidate_embeds: Tensor, sequences: Tensor, sequence_mask: Tensor
) -> Tensor:
    """
    Sequence-level reward: mean cosine between the query and its demonstrations.

    Args:
        query_embeds (`Tensor`):
            Query embeddings `(B, D)`.
        candidate_embeds (`Tensor`):
            Pool embeddings `(B, K, D)`, comparable with the query's (the same feature, e.g. both of the question).
        sequences (`Tensor`):
            Pool positions `(B, G, S)`.
        sequence_mask (`Tensor`):
            True for real shots `(B, G, S)`.

    Returns:
        `Tensor`: coherence `(B, G)` in [-1, 1]; 0 for an empty sequence.

    Raises:
        `ValueError`: if query and candidates have different widths.

    Example:

    ```python
    >>> import torch
    >>> pool = torch.eye(2).unsqueeze(0)
    >>> sequences = torch.tensor([[[0, 1], [0, 0]]])
    >>> mask = torch.tensor([[[True, True], [True, False]]])
    >>> sequence_coherence(torch.tensor([[3.0, 0.0]]), pool, sequences, mask)
    tensor([[0.5000, 1.0000]])

    ```
    """
    if query_embeds.shape[-1] != candidate_embeds.shape[-1]:
        raise ValueError(
            f"query embeddings are {query_embeds.shape[-1]} wide, candidate embeddings {candidate_embeds.shape[-1]}: "
            "a cosine needs the same feature on both sides; pass the part that they share."
        )
    mask = sequence_mask.bool()
    query = F.normalize(upcast_half(query_embeds), dim=-1)[:, None, None]  # (B, 1, 1, D)
    cosine = (query * _demonstrations(candidate_embeds, sequences, mask)).sum(-1)  # (B, G, S)
    return cosine.sum(-1) / mask.sum(-1).clamp(min=1)


def sequence_diversity(candidate_embeds: Tensor, sequences: Tensor, sequence_mask: Tensor) -> Tensor:
    """
    Sequence-level reward: 1 - mean cosine between the pairs of demonstrations in a sequence.

    Args:
        candidate_embeds (`Tensor`):
            Pool embeddings `(B, K, D)`.
        sequences (`Tensor`):
            Pool positions `(B, G, S)`.
        sequence_mask (`Tensor`):
            True for real shots `(B, G, S)`.

    Returns:
        `Tensor`: diversity `(B, G)` in [0, 2]; 0 for a sequence of fewer than two shots, which has no pairs.

    Example:

    ```python
    >>> import torch
    >>> pool = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]]])
    >>> sequences = torch.tensor([[[0, 1], [0, 2]]])
    >>> sequence_diversity(pool, sequences, torch.ones(1, 2, 2, dtype=torch.bool))
    tensor([[1., 0.]])

    ```
    """
    mask = sequence_mask.bool()
    units = _demonstrations(candidate_embeds, sequences, mask)  # (B, G, S, D)
    count = mask.sum(-1)  # (B, G)
    # |sum of units|^2 holds every ordered pair's cosine and each unit's own square.
    pairs = units.sum(-2).square().sum(-1) - units.square().sum((-1, -2))  # (B, G)
    return torch.where(count > 1, 1 - pairs / (count * (count - 1)).clamp(min=1), 0.0)


def combine_rewards(
    levels: Mapping[str, Tensor],
    weights: Mapping[str, float],
    mask: Tensor | None = None,
    aggregation: str = "sum_then_normalize",
    epsilon: float = 1e-6,
) -> Tensor:
    """
    Weighted sum of the levels of a multi-level reward (beam, coherence, diversity, task).

    Args:
        levels (`Mapping[str, Tensor]`):
            Reward of each level `(B, G)`.
        weights (`Mapping[str, float]`):
            Weight of each level; exactly the names in `levels`. A level of weight 0 is not read.
        mask (`Tensor`, *optional*):
            True for live beams `(B, G)`.
        aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            TRL's `multi_objective_aggregation`. `"sum_then_normalize"`: the plain weighted sum, normalised later by
            [`group_advantages`]; a level then counts by its scale. `"normalize_then_sum"`: each level is standardised
            in its group first (GDPO, [2601.05242](https://huggingface.co/papers/2601.05242)), so weights compare
            across scales; a level that ties inside the group adds nothing. GDPO then divides by the batch's std:
            `scale_rewards="batch"`.
        epsilon (`float`, *optional*, defaults to `1e-6`):
            Relative spread below which a level counts as tied.

    Returns:
        `Tensor`: the reward `(B, G)`, 0 where masked.

    Raises:
        `ValueError`: for an unknown `aggregation`, no levels, names that differ between `levels` and `weights`, shapes
        that differ, or a live value that is not finite.

    Example:

    ```python
    >>> import torch
    >>> levels = {"beam": torch.tensor([[0.01, 0.02, 0.03]]), "task": torch.tensor([[1.0, 0.0, 0.0]])}
    >>> combine_rewards(levels, {"beam": 1.0, "task": 0.5})
    tensor([[0.5100, 0.0200, 0.0300]])
    >>> combine_rewards(levels, {"beam": 1.0, "task": 0.5}, aggregation="normalize_then_sum")
    tensor([[-0.4226, -0.2887,  0.7113]])

    ```
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r}: must be one of {', '.join(AGGREGATIONS)}.")
    if not levels or set(levels) != set(weights):
        raise ValueError(
            f"levels are {sorted(levels)}, weights are for {sorted(weights)}: give every level one weight, "
            "0 to leave it out."
        )
    _check_same_shape(levels)
    total = torch.zeros_like(upcast_half(next(iter(levels.values()))))  # (B, G)
    live = torch.ones_like(total, dtype=torch.bool) if mask is None else mask.bool()
    size = torch.zeros_like(total)  # of what is summed
    for name, level in levels.items():
        if weights[name] == 0:
            continue
        values = torch.where(live, upcast_half(level), 0.0)
        if not torch.isfinite(values).all():
            index = (~torch.isfinite(values)).nonzero()[0].tolist()
            raise ValueError(
                f"reward level {name!r} is {values[tuple(index)].item()} at {index}: live beams need finite values; "
                "mask the beam, or give the level the weight 0."
            )
        if aggregation == "normalize_then_sum":
            values = normalize_rewards_zscore(values, live, epsilon)
            size = size + abs(weights[name]) * values.abs()
        total = total + weights[name] * values
    # levels that cancel leave rounding errors, which are no contrast
    cancelled = total.abs().amax(-1, keepdim=True) <= epsilon * size.amax(-1, keepdim=True)
    return total.masked_fill(cancelled, 0.0) if aggregation == "normalize_then_sum" else total
