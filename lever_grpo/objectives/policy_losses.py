"""Losses of one group of logged beams, for every loss type of the trainer.

B queries (groups) in a batch, G sequences in a group, S shots. All losses come **per group** `(B,)`: the caller sums
over live groups and divides by their number, so padding, gradient accumulation and the number of processes cannot
change a loss.
"""

import torch
from torch import Tensor

from .advantages import upcast_half
from .divergences import bound_log_ratio


LOSS_TYPES = ("grpo", "dr_grpo", "cispo", "sapo", "rwr", "listwise_kl", "asymre")
IMPORTANCE_SAMPLING_LEVELS = ("token", "sequence", "joint")
# These read `weights` (a distribution over the group); the others read `advantages`.
WEIGHTED_LOSS_TYPES = ("rwr", "listwise_kl")


def _live(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """Values in computing precision with 0 where masked; a live value that is not finite is an error."""
    values = torch.where(mask, upcast_half(values), 0.0)
    if not torch.isfinite(values).all():
        index = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise ValueError(
            f"{name}{index} is {values[tuple(index)].item()}: a live beam needs finite values. A log-probability of "
            "-inf means that the logged pick was not available to the policy (a repeated or padded candidate): "
            "drop the beam or mask it."
        )
    return values


def _check_shapes(expected: torch.Size, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}.")


def _check_weights(weights: Tensor) -> None:
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise ValueError("weights has a negative or non-finite value: pass compute_softmax_weights(rewards, τ, mask).")


def _log_importance(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """Log of the importance ratio: `(B, G, S)` at token level, else `(B, G, 1)`. `log_ratio` is 0 where masked."""
    if level == "token":
        return log_ratio
    joint = log_ratio.sum(-1, keepdim=True)
    return joint if level == "joint" else joint / mask.sum(-1, keepdim=True).clamp(min=1)


def _sequence_log_probs(log_probs: Tensor, mask: Tensor, length_normalize: bool) -> Tensor:
    """Log-probability of each beam `(B, G)`, summed over its shots (or averaged)."""
    total = log_probs.sum(-1)
    return total / mask.sum(-1).clamp(min=1) if length_normalize else total


def _listwise_kl(beam_log_probs: Tensor, weights: Tensor, beam_mask: Tensor) -> Tensor:
    """KL(weights || policy renormalised over the live beams), `(B,)`."""
    logits = beam_log_probs.masked_fill(~beam_mask, -torch.inf)  # (B, G)
    # A row of -inf alone has no softmax; its weights are 0, so any logits will do.
    log_policy = logits.masked_fill(~beam_mask.any(-1, keepdim=True), 0.0).log_softmax(-1)
    counted = weights > 0
    log_target = torch.where(counted, weights, 1.0).log()
    return (weights * (log_target - torch.where(counted, log_policy, 0.0))).sum(-1)


def group_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor | None,
    advantages: Tensor | None,
    sequence_mask: Tensor,
    beam_mask: Tensor,
    *,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    max_length: int | None = None,
    weights: Tensor | None = None,
    length_normalize: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""
    Policy loss of each group, and what it did: ratios and clip fractions.

    With the importance ratio r of policy to old policy, the advantage A and w = softmax(R / τ) over the group:

    - `"grpo"`: the mean over a beam's shots of −min(r·A, clip(r, 1−ε, 1+ε_high)·A), then the mean over beams.
      DeepSeekMath, [2402.03300](https://huggingface.co/papers/2402.03300), eq. 3.
    - `"dr_grpo"`: the same, but the sum over shots divided by the constant `max_length`. Dr. GRPO,
      [2503.20783](https://huggingface.co/papers/2503.20783).
    - `"cispo"`: −sg(min(r, ε_high))·A·log π, the mean over all shots of the group. MiniMax-M1,
      [2506.13585](https://huggingface.co/papers/2506.13585), eq. 4; one-sided as in ScaleRL,
      [2510.13786](https://huggingface.co/papers/2510.13786).
    - `"sapo"`: −(4/t)·σ(t·(r − 1))·A with t by the sign of A, the mean over shots, then over beams. The gate never
      closes entirely. [2511.20347](https://huggingface.co/papers/2511.20347).
    - `"asymre"`: −A·log π(y), the mean over beams, without a ratio. Take A with a `baseline_shift` above 0.
      [2506.20520](https://huggingface.co/papers/2506.20520).
    - `"rwr"`: −Σ w·log π(y), see [`rce_loss`]. Peters & Schaal, 2007.
    - `"listwise_kl"`: KL(w ‖ π renormalised over the group's beams): the top-one loss of ListNet (Cao et al., 2007,
      "Learning to rank: from pairwise approach to listwise approach", ICML) less the entropy of w.

    π(y) is the probability of the whole sequence. The first four are TRL's, names and defaults included, applied to
    one group, with two departures: the ratio's logarithm is limited to ±20 ([`bound_log_ratio`]), and `"cispo"`
    without `epsilon_high` takes 5.0, the recommended value, where TRL falls back to `epsilon` and so scales every beam
    by 0.2.

    Args:
        log_probs (`Tensor`):
            The policy's log-probability of each logged pick `(B, G, S)`.
        old_log_probs (`Tensor`, *optional*):
            The old policy's, same shape. `None` means the policy itself, detached: a ratio of exactly 1 that carries
            the gradient.
        advantages (`Tensor`, *optional*):
            `(B, G)`, from [`group_advantages`]. Not read by `"rwr"` and `"listwise_kl"`.
        sequence_mask (`Tensor`):
            True for real shots `(B, G, S)`.
        beam_mask (`Tensor`):
            True for beams that count `(B, G)`: not padded, in a group that is not tied, selected by the curriculum.
            Whatever a masked beam or shot holds (NaN, -inf) touches neither the loss nor a gradient.
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            See above.
        importance_sampling_level (`str`, *optional*, defaults to `"token"`):
            `"token"`: a ratio per shot. `"sequence"`: exp(mean log-ratio over shots), the length-normalised ratio of
            GSPO ([2507.18071](https://huggingface.co/papers/2507.18071)). `"joint"`: exp(sum), the exact importance
            ratio of the sequence.
        epsilon (`float`, *optional*, defaults to `0.2`):
            Lower clip range. Raising it lets a beam lose more probability per refresh of the old policy.
        epsilon_high (`float`, *optional*):
            Upper clip range, by default `epsilon`. Raising it lets good beams gain more. For `"cispo"` it bounds the
            ratio itself.
        delta (`float`, *optional*):
            Upper bound of the unclipped ratio in `"grpo"` and `"dr_grpo"` (INTELLECT-2,
            [2505.07291](https://huggingface.co/papers/2505.07291)), above 1 + `epsilon_high`. It bounds how hard a bad
            beam whose probability grew is pushed back.
        sapo_temperature_pos (`float`, *optional*, defaults to `1.0`):
            Sharpness of the soft gate where A > 0. Raising it closes the gate sooner.
        sapo_temperature_neg (`float`, *optional*, defaults to `1.05`):
            The same where A <= 0.
        max_length (`int`, *optional*):
            The constant of `"dr_grpo"`: the longest sequence of the **data** (not of the batch, which padding would
            change).
        weights (`Tensor`, *optional*):
            Target distribution over the group `(B, G)` for `"rwr"` and `"listwise_kl"`, from
            [`compute_softmax_weights`]. Renormalised over the beams in `beam_mask`, which equals the softmax over
            those beams alone.
        length_normalize (`bool`, *optional*, defaults to `False`):
            In `"rwr"`, `"listwise_kl"` and `"asymre"`, use the mean instead of the sum over shots as log π(y).

    Returns:
        `tuple[Tensor, dict[str, Tensor]]`: the loss of each group `(B,)`, exactly 0 with zero gradient for a group
        without live beams; and detached statistics, each `(B,)` and 0 for such groups:

        - `ratio_mean`: mean importance ratio;
        - `clip_ratio/low_mean`, `clip_ratio/high_mean`, `clip_ratio/region_mean` (`"grpo"`, `"dr_grpo"`): the share of
          ratios clipped below (with A < 0), above (with A > 0), or either: where the gradient is zero;
        - `cispo_clip_ratio` (`"cispo"`): the share of ratios above `epsilon_high` with A > 0.

    Raises:
        `ValueError`: for an unknown `loss_type` or level, missing `advantages`, `weights` or `max_length`, shapes that
        do not fit, or a live log-probability, advantage or weight that is not finite.

    Example:

    ```python
    >>> import torch
    >>> new = torch.tensor([[[0.6, 0.5], [0.2, 0.5]]]).log()
    >>> old = torch.tensor([[[0.4, 0.5], [0.2, 0.5]]]).log()
    >>> mask = torch.ones(1, 2, 2, dtype=torch.bool)
    >>> loss, stats = group_policy_loss(new, old, torch.tensor([[1.0, -1.0]]), mask, mask[..., 0])
    >>> loss  # ratios 1.5 (clipped to 1.2) and 1 for the good beam, 1 and 1 for the bad one
    tensor([-0.0500])
    >>> stats["clip_ratio/high_mean"]
    tensor([0.2500])

    ```
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type={loss_type!r}: must be one of {', '.join(LOSS_TYPES)}.")
    if importance_sampling_level not in IMPORTANCE_SAMPLING_LEVELS:
        raise ValueError(
            f"importance_sampling_level={importance_sampling_level!r}: must be one of "
            f"{', '.join(IMPORTANCE_SAMPLING_LEVELS)}."
        )
    _check_shapes(log_probs.shape, old_log_probs=old_log_probs, sequence_mask=sequence_mask)
    _check_shapes(log_probs.shape[:-1], advantages=advantages, weights=weights, beam_mask=beam_mask)

    beam_mask = beam_mask.bool()  # (B, G)
    mask = sequence_mask.bool() & beam_mask.unsqueeze(-1)  # (B, G, S)
    beams = beam_mask.sum(-1)  # (B,)
    log_probs = _live("log_probs", log_probs, mask)  # (B, G, S)
    old = log_probs.detach() if old_log_probs is None else _live("old_log_probs", old_log_probs, mask)
    log_ratio = bound_log_ratio(_log_importance(log_probs - old, mask, importance_sampling_level))
    ratio = log_ratio.exp()  # (B, G, S) or (B, G, 1)
    # One ratio a beam counts once; one a shot counts for each real shot.
    ratio_mask = mask if importance_sampling_level == "token" else beam_mask.unsqueeze(-1)

    def share(values: Tensor) -> Tensor:
        values = torch.where(ratio_mask, values.detach().to(log_probs.dtype), 0.0)
        return values.sum((-1, -2)) / ratio_mask.sum((-1, -2)).clamp(min=1)  # (B,)

    stats = {"ratio_mean": share(ratio)}

    if loss_type in WEIGHTED_LOSS_TYPES:
        if weights is None:
            raise ValueError(
                f"loss_type={loss_type!r} needs weights (B, G): pass compute_softmax_weights(rewards, τ, mask)."
            )
        weights = _live("weights", weights, beam_mask)
        _check_weights(weights)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
        if loss_type == "rwr":
            return rce_loss(log_probs, weights, mask, length_normalize=length_normalize), stats
        return _listwise_kl(_sequence_log_probs(log_probs, mask, length_normalize), weights, beam_mask), stats

    if advantages is None:
        raise ValueError(f"loss_type={loss_type!r} needs advantages (B, G): pass group_advantages(rewards, mask).")
    beam_advantages = _live("advantages", advantages, beam_mask)  # (B, G)
    if loss_type == "asymre":
        beam_loss = -beam_advantages * _sequence_log_probs(log_probs, mask, length_normalize)  # (B, G)
        return beam_loss.sum(-1) / beams.clamp(min=1), stats

    adv = beam_advantages.unsqueeze(-1)  # (B, G, 1)
    if loss_type == "cispo":
        bound = 5.0 if epsilon_high is None else epsilon_high
        shot_loss = -ratio.clamp(max=bound).detach() * adv * log_probs
        stats["cispo_clip_ratio"] = share((ratio > bound) & (adv > 0))
    elif loss_type == "sapo":
        temperature = torch.where(adv > 0, adv.new_tensor(sapo_temperature_pos), adv.new_tensor(sapo_temperature_neg))
        shot_loss = -torch.sigmoid(temperature * (ratio - 1)) * (4 / temperature) * adv
    else:
        lowest, highest = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
        clipped = ratio.clamp(lowest, highest)
        ratio = ratio if delta is None else ratio.clamp(max=delta)
        shot_loss = -torch.min(ratio * adv, clipped * adv)
        low, high = (ratio < lowest) & (adv < 0), (ratio > highest) & (adv > 0)
        stats["clip_ratio/low_mean"] = share(low)
        stats["clip_ratio/high_mean"] = share(high)
        stats["clip_ratio/region_mean"] = share(low | high)

    shot_loss = torch.where(mask, shot_loss, 0.0)  # (B, G, S); a ratio per beam is repeated for each of its shots
    if loss_type == "cispo":
        return shot_loss.sum((-1, -2)) / mask.sum((-1, -2)).clamp(min=1), stats
    if loss_type == "dr_grpo":
        if max_length is None or max_length < 1:
            raise ValueError(
                f"max_length={max_length}: loss_type='dr_grpo' needs the longest sequence of the data, 1 or more."
            )
        beam_loss = shot_loss.sum(-1) / max_length  # (B, G)
    else:
        beam_loss = shot_loss.sum(-1) / mask.sum(-1).clamp(min=1)  # (B, G)
    return beam_loss.sum(-1) / beams.clamp(min=1), stats


def rce_loss(log_probs: Tensor, weights: Tensor, sequence_mask: Tensor, length_normalize: bool = False) -> Tensor:
    r"""
    Reward-weighted cross-entropy of each group: \\( -\sum_i w_i \log \pi(y_i) \\).

    With uniform weights this is supervised fine-tuning on the group's beams. The form is reward-weighted regression
    (Peters & Schaal, 2007, "Reinforcement learning by reward-weighted regression", ICML).

    Args:
        log_probs (`Tensor`):
            The policy's log-probability of each logged pick `(B, G, S)`.
        weights (`Tensor`):
            Weights `(B, G)` from [`compute_softmax_weights`]: rows sum to 1, 0 for padded beams. A beam of weight 0 is
            left out whatever it holds.
        sequence_mask (`Tensor`):
            True for real shots `(B, G, S)`.
        length_normalize (`bool`, *optional*, defaults to `False`):
            Use the mean instead of the sum over a beam's shots.

    Returns:
        `Tensor`: loss of each group `(B,)`, 0 with zero gradient for a group without weight.

    Raises:
        `ValueError`: if shapes do not fit, a weight is negative or not finite, or a live log-probability is not
        finite.

    Example:

    ```python
    >>> import torch
    >>> log_probs = torch.tensor([[[0.5, 0.5], [0.1, 0.5]]]).log()
    >>> mask = torch.ones(1, 2, 2, dtype=torch.bool)
    >>> rce_loss(log_probs, torch.tensor([[1.0, 0.0]]), mask)  # -ln(0.5 * 0.5)
    tensor([1.3863])

    ```
    """
    _check_shapes(log_probs.shape, sequence_mask=sequence_mask)
    _check_shapes(log_probs.shape[:-1], weights=weights)
    weights = upcast_half(weights)
    _check_weights(weights)
    mask = sequence_mask.bool() & (weights > 0).unsqueeze(-1)  # (B, G, S)
    beam_log_probs = _sequence_log_probs(_live("log_probs", log_probs, mask), mask, length_normalize)
    return -(weights * beam_log_probs).sum(-1)
