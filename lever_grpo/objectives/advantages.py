"""From a group's rewards to what weighs each beam: advantages, softmax weights, curriculum masks.

B queries (groups) in a batch, G sequences in a group. Every function also takes one group as `(G,)`.

Scores of a beam log run from 1e-8 to 0.5 and log-probabilities to -100, so nothing here knows a scale: each group is
measured in units of its own spread, and "tied" means that the spread is below `epsilon` times the magnitude of the
group's scores.
"""

import torch
from torch import Tensor


SCALE_REWARDS = ("group", "batch", "none", "rank")


def upcast_half(x: Tensor) -> Tensor:
    """Bring half types and integers to float32; float64 stays, so that finite differences can be taken."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _as_groups(rewards: Tensor, mask: Tensor | None, what: str = "rewards") -> tuple[Tensor, Tensor]:
    """`(B, G)` values with zeros where masked, and the `(B, G)` mask; a single group becomes a batch of one."""
    rewards = upcast_half(rewards)
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask.bool()
    if rewards.shape != mask.shape or rewards.dim() not in (1, 2):
        raise ValueError(
            f"{what} has shape {tuple(rewards.shape)} and mask {tuple(mask.shape)}: both must be (B, G) or both (G,); "
            "pass one value and one mask entry per beam."
        )
    rewards, mask = rewards.reshape(-1, rewards.shape[-1]), mask.reshape(-1, mask.shape[-1])
    # Not a product with the mask: 0 * NaN would let padding through.
    values = torch.where(mask, rewards, 0.0)  # (B, G)
    limit = torch.finfo(values.dtype).max / 4  # so that differences are finite, too
    good = values.abs() <= limit  # a NaN is not
    if not good.all():
        group, beam = (~good).nonzero()[0].tolist()
        raise ValueError(
            f"{what}[{group}, {beam}] is {values[group, beam].item()}: a live beam needs a finite value, of at most "
            f"{limit:.1e}; drop the beam when the log is read, scale the scores, or set its mask entry to False."
        )
    return values, mask


def _spread(values: Tensor, mask: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to the group's best `(B, G)` (<= 0), the spread `(B, 1)`, and which groups `(B, 1)` are tied."""
    # A difference of close floats is exact, so measuring from the best score loses nothing to a large common offset.
    best = values.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)  # (B, 1)
    best = torch.where(mask.any(-1, keepdim=True), best, 0.0).detach()
    below = torch.where(mask, values - best, 0.0)  # (B, G)
    spread = below.detach().abs().amax(-1, keepdim=True)  # (B, 1)
    magnitude = values.detach().abs().amax(-1, keepdim=True)  # (B, 1)
    # One beam alone has spread 0, so groups with fewer than two live beams are tied as well.
    return below, spread, spread <= epsilon * magnitude


def _unit_groups(values: Tensor, mask: Tensor, epsilon: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centred scores `(B, G)` and std `(B, 1)` in units of the spread `(B, 1)`; which groups are tied (zeros)."""
    below, spread, tied = _spread(values, mask, epsilon)
    count = mask.sum(-1, keepdim=True)  # (B, 1)
    # In units of the spread the squares can neither under- nor overflow, whatever the scale of the scores.
    unit = torch.where(tied, 0.0, below / torch.where(tied, 1.0, spread))  # (B, G)
    unit = torch.where(mask, unit - unit.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    variance = unit.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)  # (B, 1)
    std = torch.where(tied, 1.0, variance).sqrt()  # (B, 1); 1 for tied groups keeps the gradient of sqrt finite
    return unit, std, spread, tied


def normalize_rewards_zscore(rewards: Tensor, mask: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    r"""
    Standardise rewards inside each group: \\( z_i = (R_i - \mathrm{mean}(R)) / \mathrm{std}(R) \\).

    This is the group-relative advantage of GRPO (Shao et al., 2024,
    [DeepSeekMath](https://huggingface.co/papers/2402.03300), §4.1.2). As in TRL the std is the unbiased one (division
    by n - 1), so with n live beams \\( |z| \le (n-1)/\sqrt{n} \\): 1.79 for n = 5. Unlike TRL nothing is added to the
    std. A group whose spread is at most `epsilon` times the magnitude of its scores is tied and gets zeros, which
    neither amplifies float noise nor silences scores of 1e-8.

    Args:
        rewards (`Tensor`):
            Scores `(B, G)` or `(G,)`, on any scale.
        mask (`Tensor`, *optional*):
            Same shape, True for live beams. Masked entries may hold anything, NaN included, and come back as 0.
        epsilon (`float`, *optional*, defaults to `1e-6`):
            Relative spread below which a group counts as tied. Raising it drops more groups that nearly tie.

    Returns:
        `Tensor`: z-scores of the same shape, float32 (float64 for float64 scores).

    Raises:
        `ValueError`: if shapes differ or a live score is not finite.

    Example:

    ```python
    >>> import torch
    >>> normalize_rewards_zscore(torch.tensor([[1.0, 2.0, 3.0], [1e-8, 1e-8, 4e-8], [0.5, 0.5, 0.5]]))
    tensor([[-1.0000,  0.0000,  1.0000],
            [-0.5774, -0.5774,  1.1547],
            [ 0.0000,  0.0000,  0.0000]])

    ```
    """
    values, live = _as_groups(rewards, mask)
    unit, std, _, _ = _unit_groups(values, live, epsilon)
    return (unit / std).reshape(rewards.shape)


def clip_advantages(advantages: Tensor, clip: float | None = 5.0) -> Tensor:
    r"""
    Clip advantages to `[-clip, clip]`.

    A z-score over n beams never exceeds \\( (n-1)/\sqrt{n} \\), so the default of 5 first acts on groups of 28 and
    more; it matters for `scale_rewards="batch"` and `"none"`. Lower it to bound how hard a single beam can pull.

    Args:
        advantages (`Tensor`):
            Advantages of any shape.
        clip (`float`, *optional*, defaults to `5.0`):
            Bound, above 0. `None` returns the advantages as they are.

    Returns:
        `Tensor`: clipped advantages of the same shape.

    Raises:
        `ValueError`: if `clip` is not positive.

    Example:

    ```python
    >>> import torch
    >>> clip_advantages(torch.tensor([-7.0, 0.5, 6.0]))
    tensor([-5.0000,  0.5000,  5.0000])

    ```
    """
    if clip is None:
        return advantages
    if not clip > 0:
        raise ValueError(f"clip={clip}: must be above 0; pass None for no clipping.")
    return advantages.clamp(-clip, clip)


def tied_groups(rewards: Tensor, mask: Tensor | None = None, epsilon: float = 1e-6) -> Tensor:
    """
    Say which groups carry no contrast: all live scores equal (relative to their magnitude), or fewer than two live
    beams.

    Such a group has no advantage. The trainer leaves it out of the loss, the KL term and the denominator.

    Args:
        rewards (`Tensor`):
            Scores `(B, G)`, or `(G,)` for one group.
        mask (`Tensor`, *optional*):
            Same shape, True for live beams.
        epsilon (`float`, *optional*, defaults to `1e-6`):
            Relative spread below which a group counts as tied.

    Returns:
        `Tensor`: bool, `(B,)`; a scalar tensor for one group.

    Raises:
        `ValueError`: if shapes differ or a live score is not finite.

    Example:

    ```python
    >>> import torch
    >>> tied_groups(torch.tensor([[0.5, 0.5], [1e-8, 2e-8]]))
    tensor([ True, False])

    ```
    """
    _, _, tied = _spread(*_as_groups(rewards, mask), epsilon)
    return tied.reshape(rewards.shape[:-1])


def compute_softmax_weights(
    rewards: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    normalize: bool = True,
    epsilon: float = 1e-6,
) -> Tensor:
    r"""
    Weights of the beams in reward-weighted cross-entropy: \\( w = \mathrm{softmax}(R / \tau) \\) inside each group.

    By default the softmax sees the group's z-scores. On raw scores a temperature has no meaning across logs: scores of
    0.03 to 0.05 at \\( \tau = 2 \\) give weights of 0.199 to 0.201, which is plain supervised fine-tuning. Exponential
    reward weights are those of reward-weighted regression (Peters & Schaal, 2007, "Reinforcement learning by
    reward-weighted regression", ICML).

    Args:
        rewards (`Tensor`):
            Scores `(B, G)` or `(G,)`.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature, above 0. Raising it brings the weights nearer to uniform.
        mask (`Tensor`, *optional*):
            Same shape, True for live beams; masked beams get weight 0.
        normalize (`bool`, *optional*, defaults to `True`):
            Standardise inside the group first. False uses the raw scores.
        epsilon (`float`, *optional*, defaults to `1e-6`):
            Relative spread below which a group counts as tied and gets uniform weights.

    Returns:
        `Tensor`: weights of the same shape. Each row sums to 1, or to 0 when the group has no live beam.

    Raises:
        `ValueError`: if `temperature` is not positive, shapes differ or a live score is not finite.

    Example:

    ```python
    >>> import torch
    >>> scores = torch.tensor([0.03, 0.04, 0.05])
    >>> compute_softmax_weights(scores, temperature=2.0, normalize=False)
    tensor([0.3317, 0.3333, 0.3350])
    >>> compute_softmax_weights(scores, temperature=2.0)
    tensor([0.1863, 0.3072, 0.5065])

    ```
    """
    if not temperature > 0:
        raise ValueError(
            f"temperature={temperature}: must be above 0; a small value already picks the best beam alone."
        )
    values, live = _as_groups(rewards, mask)
    if normalize:
        unit, std, _, _ = _unit_groups(values, live, epsilon)
        values = unit / std
    below, _, tied = _spread(values, live, epsilon)  # the best beam at 0, so exp cannot overflow
    weights = torch.where(live, torch.exp(torch.where(tied, 0.0, below) / temperature), 0.0)  # (B, G)
    # The best live beam contributes exp(0) = 1: the sum is below 1 only when no beam is live.
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1.0)).reshape(rewards.shape)


def effective_beams(weights: Tensor) -> Tensor:
    r"""
    Effective number of beams behind a set of weights: \\( 1 / \sum_i w_i^2 \\) (Kish's effective sample size).

    G for uniform weights, 1 when one beam has all the weight.

    Args:
        weights (`Tensor`):
            Weights `(B, G)` whose rows sum to 1, or one row `(G,)`.

    Returns:
        `Tensor`: `(B,)`, 0 for a row without weight; a scalar tensor for one row.

    Example:

    ```python
    >>> import torch
    >>> effective_beams(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]]))
    tensor([4., 1.])

    ```
    """
    energy = upcast_half(weights).square().sum(-1)  # (B,)
    return torch.where(energy > 0, 1.0 / torch.where(energy > 0, energy, 1.0), 0.0)


def rewards_std(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """
    Unbiased standard deviation over all live rewards, the unit of `scale_rewards="batch"`.

    Take it once over the training log and pass it as `batch_std`, and advantages no longer depend on which groups
    share a batch.

    Args:
        rewards (`Tensor`):
            Scores `(B, G)` or `(G,)`.
        mask (`Tensor`, *optional*):
            Same shape, True for live beams.

    Returns:
        `Tensor`: scalar, 0 with fewer than two live rewards.

    Raises:
        `ValueError`: if shapes differ or a live score is not finite.

    Example:

    ```python
    >>> import torch
    >>> rewards_std(torch.tensor([[1.0, 2.0], [3.0, 99.0]]), torch.tensor([[True, True], [True, False]]))
    tensor(1.)

    ```
    """
    values, live = _as_groups(rewards, mask)
    unit, std, spread, tied = _unit_groups(values.reshape(1, -1), live.reshape(1, -1), epsilon=0.0)
    return torch.where(tied, 0.0, std * spread).squeeze()


def _centred_ranks(values: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Ranks in `[-1, 1]`, worst to best, ties at their mean rank: the balance of beams beaten and beams lost to."""
    magnitude = values.detach().abs().amax(-1, keepdim=True).unsqueeze(-1)  # (B, 1, 1)
    difference = values.unsqueeze(-1) - values.unsqueeze(-2)  # (B, G, G), entry ij: R_i - R_j
    counted = (difference.abs() > epsilon * magnitude) & mask.unsqueeze(-1) & mask.unsqueeze(-2)
    balance = torch.where(counted, difference.sign(), 0.0).sum(-1)  # (B, G)
    return balance / (mask.sum(-1, keepdim=True) - 1).clamp(min=1)


def group_advantages(
    rewards: Tensor,
    mask: Tensor | None = None,
    scale_rewards: str = "group",
    clip: float | None = 5.0,
    epsilon: float = 1e-6,
    baseline_shift: float = 0.0,
    batch_std: Tensor | float | None = None,
) -> Tensor:
    r"""
    Advantage of each beam against its group, \\( A_i = (R_i - V) / \sigma \\) with the baseline
    \\( V = \mathrm{mean}(R) - \mathrm{shift} \cdot \mathrm{std}(R) \\).

    Take advantages on the **whole** group and select beams afterwards with [`curriculum_mask`]: on the top three alone
    a good third beam gets \\( A = -1.15 \\) and the real negatives are gone. That literal variant is
    `group_advantages(rewards, curriculum_mask(rewards, mask, top_k=3))`.

    Args:
        rewards (`Tensor`):
            Scores `(B, G)` or `(G,)`.
        mask (`Tensor`, *optional*):
            Same shape, True for live beams.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What the centred score is divided by:

            - `"group"`: the group's std (GRPO, [2402.03300](https://huggingface.co/papers/2402.03300)).
            - `"batch"`: the std of all live rewards ([2508.08221](https://huggingface.co/papers/2508.08221)), see
              `batch_std`.
            - `"none"`: nothing (Dr. GRPO, [2503.20783](https://huggingface.co/papers/2503.20783)); `clip` is then in
              units of the reward.
            - `"rank"`: the score is replaced by its centred rank, worst -1 to best 1; ties share the mean rank.
        clip (`float`, *optional*, defaults to `5.0`):
            Bound of the result after the shift, see [`clip_advantages`]. `None` for no bound.
        epsilon (`float`, *optional*, defaults to `1e-6`):
            Relative spread below which a group counts as tied.
        baseline_shift (`float`, *optional*, defaults to `0.0`):
            How far the baseline lies below the mean, in standard deviations of the group (of the ranks for `"rank"`),
            0 or more. Raising it leaves fewer and weaker negatives, the safe direction off-policy (AsymRE,
            [2506.20520](https://huggingface.co/papers/2506.20520)).
        batch_std (`Tensor` or `float`, *optional*):
            For `"batch"`: the std to divide by, e.g. [`rewards_std`] of the whole log. By default that of `rewards`,
            which then makes the result depend on how groups are batched.

    Returns:
        `Tensor`: advantages of the same shape; exactly 0 for masked beams and for every beam of a tied group.

    Raises:
        `ValueError`: for an unknown `scale_rewards`, a negative `baseline_shift`, a `batch_std` that is not positive,
        shapes that differ or a live score that is not finite.

    Example:

    ```python
    >>> import torch
    >>> scores = torch.tensor([[0.1, 0.2, 0.2, 0.5]])
    >>> group_advantages(scores)
    tensor([[-0.8660, -0.2887, -0.2887,  1.4434]])
    >>> group_advantages(scores, scale_rewards="rank")
    tensor([[-1.,  0.,  0.,  1.]])
    >>> group_advantages(scores, baseline_shift=0.5)
    tensor([[-0.3660,  0.2113,  0.2113,  1.9434]])

    ```
    """
    if scale_rewards not in SCALE_REWARDS:
        raise ValueError(f"scale_rewards={scale_rewards!r}: must be one of {', '.join(SCALE_REWARDS)}.")
    if not baseline_shift >= 0:
        raise ValueError(
            f"baseline_shift={baseline_shift}: must be 0 or more; it lowers the baseline below the group's mean."
        )
    values, live = _as_groups(rewards, mask)
    unit, std, spread, tied = _unit_groups(values, live, epsilon)
    if scale_rewards == "group":
        advantages = unit / std + baseline_shift
    elif scale_rewards == "none":
        advantages = (unit + baseline_shift * std) * spread
    elif scale_rewards == "batch":
        unit_of_batch = torch.as_tensor(rewards_std(values, live) if batch_std is None else batch_std).to(values)
        if batch_std is not None and not unit_of_batch > 0:
            raise ValueError(f"batch_std={batch_std}: must be above 0; leave it out to take it from the batch.")
        # It is 0 only where every group is tied, and then the advantages are 0 whatever they are divided by.
        factor = spread / torch.where(unit_of_batch > 0, unit_of_batch, 1.0)  # (B, 1)
        # An infinite factor would make a beam at the mean NaN.
        advantages = (unit + baseline_shift * std) * factor.clamp(max=torch.finfo(factor.dtype).max)
    else:
        advantages = _centred_ranks(values, live, epsilon)
        rank_variance = advantages.square().sum(-1, keepdim=True) / (live.sum(-1, keepdim=True) - 1).clamp(min=1)
        advantages = advantages + baseline_shift * rank_variance.sqrt()
    advantages = torch.where(tied | ~live, 0.0, advantages)  # (B, G)
    return clip_advantages(advantages, clip).reshape(rewards.shape)


def curriculum_mask(rewards: Tensor, mask: Tensor | None = None, top_k: int | None = None) -> Tensor:
    """
    Select the `top_k` best live beams of each group, for the early GRPO stage.

    Use it as the loss's `beam_mask` beside advantages of the whole group (see [`group_advantages`]).

    Args:
        rewards (`Tensor`):
            Scores `(B, G)` or `(G,)`.
        mask (`Tensor`, *optional*):
            Same shape, True for live beams.
        top_k (`int`, *optional*):
            How many beams to keep, at least 1. `None` keeps all live beams.

    Returns:
        `Tensor`: bool of the same shape. Of beams that tie, the one that stands first in the group is kept.

    Raises:
        `ValueError`: if `top_k` is below 1, shapes differ or a live score is not finite.

    Example:

    ```python
    >>> import torch
    >>> curriculum_mask(torch.tensor([[0.1, 0.4, 0.4, 0.4]]), top_k=2)
    tensor([[False,  True,  True, False]])

    ```
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1; pass None to keep every beam.")
    values, live = _as_groups(rewards, mask)
    if top_k is not None:
        order = values.masked_fill(~live, -torch.inf).sort(dim=-1, descending=True, stable=True).indices  # (B, G)
        kept = torch.arange(order.shape[-1], device=order.device) < top_k  # (G,)
        live = live & torch.zeros_like(live).scatter(-1, order, kept.expand_as(order))
    return live.reshape(rewards.shape)
