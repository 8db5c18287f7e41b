"""Pure tensor functions of the objective: rewards, advantages, policy losses, divergences. No model, no files."""

from .advantages import (
    clip_advantages,
    compute_softmax_weights,
    curriculum_mask,
    effective_beams,
    group_advantages,
    normalize_rewards_zscore,
    rewards_std,
    tied_groups,
)
from .divergences import bound_log_ratio, exact_kl, kl_estimate, step_entropy
from .policy_losses import group_policy_loss, rce_loss
from .rewards import (
    REWARD_PRESETS,
    RewardPreset,
    combine_rewards,
    reward_from_columns,
    sequence_coherence,
    sequence_diversity,
)


__all__ = [
    "REWARD_PRESETS",
    "RewardPreset",
    "bound_log_ratio",
    "clip_advantages",
    "combine_rewards",
    "compute_softmax_weights",
    "curriculum_mask",
    "effective_beams",
    "exact_kl",
    "group_advantages",
    "group_policy_loss",
    "kl_estimate",
    "normalize_rewards_zscore",
    "rce_loss",
    "reward_from_columns",
    "rewards_std",
    "sequence_coherence",
    "sequence_diversity",
    "step_entropy",
    "tied_groups",
]
