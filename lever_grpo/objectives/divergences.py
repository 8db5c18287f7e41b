"""Distance of the policy from its reference, and its entropy, per step.

B queries, G sequences in a group, S shots, K candidates in the pool. A pointer's action space is small, so the KL of
every teacher-forced step is computed exactly by default; the sampled estimators are there for comparison with the
literature.
"""

import torch
from torch import Tensor

from .advantages import upcast_half


# exp(20) is 4.9e8: far beyond any ratio that means something, and its products and sums stay finite in float32.
MAX_LOG_RATIO = 20.0

DIRECTIONS = ("reverse", "forward")
KL_ESTIMATORS = ("k1", "k2", "k3")


def _check_direction(direction: str) -> None:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}: must be one of {', '.join(DIRECTIONS)}.")


def bound_log_ratio(log_ratio: Tensor, bound: float = MAX_LOG_RATIO) -> Tensor:
    """
    Limit a log-ratio to `[-bound, bound]` so that its exponential is finite, and keep its gradient.

    The value is clamped but the derivative stays 1: a beam whose probability grew far too much is still pushed back,
    with a coefficient of at most `exp(bound)`, where a plain clamp would give it no gradient at all. (Beyond 1e30 the
    gradient is 0.)

    Args:
        log_ratio (`Tensor`):
            Differences of log-probabilities, any shape.
        bound (`float`, *optional*, defaults to `20.0`):
            Largest magnitude of the result.

    Returns:
        `Tensor`: bounded log-ratios of the same shape.

    Example:

    ```python
    >>> import torch
    >>> bound_log_ratio(torch.tensor([-0.5, 300.0]))
    tensor([-0.5000, 20.0000])

    ```
    """
    finite = log_ratio.clamp(-1e30, 1e30)
    return finite.detach().clamp(-bound, bound) + (finite - finite.detach())


def exact_kl(
    step_log_probs: Tensor,
    ref_step_log_probs: Tensor,
    direction: str = "reverse",
    sequence_mask: Tensor | None = None,
) -> Tensor:
    r"""
    Exact KL divergence between the policy's and the reference's distribution over the pool, at every teacher-forced
    step.

    \\( \mathrm{KL}(\pi \| \pi_{ref}) = \sum_k \pi_k (\log \pi_k - \log \pi_{ref,k}) \\) for `"reverse"`, the roles
    exchanged for `"forward"`. The sum over steps is a Rao-Blackwellised estimate of the sequence KL (Amini et al.,
    2025, [2504.10637](https://huggingface.co/papers/2504.10637)).

    Args:
        step_log_probs (`Tensor`):
            Log-probabilities of all candidates at each step `(B, G, S, K)`, `-inf` where a candidate is padded or
            already picked.
        ref_step_log_probs (`Tensor`):
            The reference's, same shape, with `-inf` at the same candidates. A candidate that only the denominator
            rules out makes the divergence infinite, as it should.
        direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"` is KL(π‖π_ref), which punishes mass where the reference has none; `"forward"` is KL(π_ref‖π),
            which punishes losing what the reference had.
        sequence_mask (`Tensor`, *optional*):
            True for real steps `(B, G, S)`. Padded steps may hold anything, NaN included, and give 0.

    Returns:
        `Tensor`: divergence of each step `(B, G, S)`, in nats.

    Raises:
        `ValueError`: for an unknown `direction` or shapes that differ.

    Example:

    ```python
    >>> import torch
    >>> policy = torch.tensor([0.5, 0.5, 0.0]).log().view(1, 1, 1, 3)
    >>> reference = torch.tensor([0.25, 0.75, 0.0]).log().view(1, 1, 1, 3)
    >>> exact_kl(policy, reference).item()  # 0.5 ln 2 + 0.5 ln(2/3)
    0.1438...

    ```
    """
    _check_direction(direction)
    if step_log_probs.shape != ref_step_log_probs.shape:
        raise ValueError(
            f"step_log_probs has shape {tuple(step_log_probs.shape)}, ref_step_log_probs "
            f"{tuple(ref_step_log_probs.shape)}: both must be (B, G, S, K) over the same pool."
        )
    log_p, log_q = upcast_half(step_log_probs), upcast_half(ref_step_log_probs)
    if direction == "forward":
        log_p, log_q = log_q, log_p
    # 0 log 0 = 0. Only the -inf of p: a NaN, or a -inf of q alone, must stay visible in the result.
    skipped = log_p == -torch.inf  # (B, G, S, K)
    if sequence_mask is not None:
        skipped = skipped | ~sequence_mask.bool().unsqueeze(-1)
    # Replaced before exp and the product: their gradients at -inf would be NaN even behind a mask.
    log_p, log_q = log_p.masked_fill(skipped, 0.0), log_q.masked_fill(skipped, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(skipped, 0.0).sum(-1)  # (B, G, S)


def kl_estimate(
    log_probs: Tensor,
    ref_log_probs: Tensor,
    estimator: str = "k3",
    direction: str = "reverse",
    sequence_mask: Tensor | None = None,
) -> Tensor:
    r"""
    Sampled KL estimators of Schulman (2020, ["Approximating KL divergence"](http://joschu.net/blog/kl-approx.html)).

    With \\( r = \pi_{ref}/\pi \\) at the picked candidate for `"reverse"`, \\( r = \pi/\pi_{ref} \\) for `"forward"`:
    k1 = \\( -\log r \\), k2 = \\( (\log r)^2 / 2 \\), k3 = \\( r - 1 - \log r \\).

    They estimate KL(π‖π_ref) on samples **of π**, and KL(π_ref‖π) on samples **of π_ref**. Logged beams are neither,
    so prefer [`exact_kl`]. `"reverse"` k3 is the one in TRL; it explodes when a logged beam loses mass, `"forward"` k3
    when it gains.

    Args:
        log_probs (`Tensor`):
            Log-probabilities of the picked candidates `(B, G, S)`.
        ref_log_probs (`Tensor`):
            The reference's, same shape.
        estimator (`str`, *optional*, defaults to `"k3"`):
            `"k1"` (unbiased, can be negative), `"k2"` (biased, its gradient on π's samples is right) or `"k3"`
            (unbiased, never negative).
        direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"` or `"forward"`.
        sequence_mask (`Tensor`, *optional*):
            True for real steps, same shape. Padded steps may hold anything and give 0.

    Returns:
        `Tensor`: estimate of each step `(B, G, S)`. In k3 the exponent is bounded as in [`bound_log_ratio`].

    Raises:
        `ValueError`: for an unknown `estimator` or `direction`, or shapes that differ.

    Example:

    ```python
    >>> import torch
    >>> new, ref = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    >>> kl_estimate(new, ref, "k1"), kl_estimate(new, ref, "k3")
    (tensor([0.6931]), tensor([0.1931]))

    ```
    """
    _check_direction(direction)
    if estimator not in KL_ESTIMATORS:
        raise ValueError(
            f"estimator={estimator!r}: must be one of {', '.join(KL_ESTIMATORS)}; the exact KL is exact_kl()."
        )
    if log_probs.shape != ref_log_probs.shape:
        raise ValueError(
            f"log_probs has shape {tuple(log_probs.shape)}, ref_log_probs {tuple(ref_log_probs.shape)}: "
            "they must be equal, (B, G, S)."
        )
    log_probs, ref_log_probs = upcast_half(log_probs), upcast_half(ref_log_probs)
    if sequence_mask is not None:
        log_probs = torch.where(sequence_mask.bool(), log_probs, 0.0)
        ref_log_probs = torch.where(sequence_mask.bool(), ref_log_probs, 0.0)
    log_r = ref_log_probs - log_probs if direction == "reverse" else log_probs - ref_log_probs  # (B, G, S)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    log_r = bound_log_ratio(log_r)
    return torch.expm1(log_r) - log_r


def step_entropy(step_log_probs: Tensor, normalize: bool = False, sequence_mask: Tensor | None = None) -> Tensor:
    r"""
    Entropy of the policy's distribution over the pool at every step, \\( -\sum_k \pi_k \log \pi_k \\).

    Args:
        step_log_probs (`Tensor`):
            Log-probabilities of all candidates at each step `(B, G, S, K)`, `-inf` where a candidate is not available.
        normalize (`bool`, *optional*, defaults to `False`):
            Divide by the log of the number of available candidates, so that 1 is uniform whatever the pool. A step
            with one candidate left has no choice and gives 0.
        sequence_mask (`Tensor`, *optional*):
            True for real steps `(B, G, S)`. Padded steps may hold anything and give 0.

    Returns:
        `Tensor`: entropy of each step `(B, G, S)`, in nats, or in `[0, 1]` with `normalize`.

    Example:

    ```python
    >>> import torch
    >>> step = torch.tensor([0.5, 0.5, 0.0]).log().view(1, 1, 1, 3)
    >>> step_entropy(step).item(), step_entropy(step, normalize=True).item()
    (0.6931..., 1.0)

    ```
    """
    log_probs = upcast_half(step_log_probs)
    skipped = log_probs == -torch.inf  # (B, G, S, K)
    if sequence_mask is not None:
        skipped = skipped | ~sequence_mask.bool().unsqueeze(-1)
    log_probs = log_probs.masked_fill(skipped, 0.0)
    entropy = -(log_probs.exp() * log_probs).masked_fill(skipped, 0.0).sum(-1)  # (B, G, S)
    if normalize:
        available = (~skipped).sum(-1)  # (B, G, S)
        entropy = torch.where(available > 1, entropy / available.clamp(min=2).to(entropy.dtype).log(), 0.0)
    return entropy
