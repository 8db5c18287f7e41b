"""How good a selector's choices are, and how sure one can be of it (numpy only; imports nothing of this package)."""

from .bootstrap import Interval, mean_interval, paired_interval, pooled_interval, sign_flip_p_value
from .cider import cider
from .groups import expected_reward, mid_ranks, rank_correlation, rank_correlations
from .selection import (
    changed_share,
    gap_closed,
    lookup_reward,
    oracle_reward,
    random_reward,
    regret,
    score_percentile,
    sequences_of_length,
)


__all__ = [
    "Interval",
    "changed_share",
    "cider",
    "expected_reward",
    "gap_closed",
    "lookup_reward",
    "mean_interval",
    "mid_ranks",
    "oracle_reward",
    "paired_interval",
    "pooled_interval",
    "random_reward",
    "rank_correlation",
    "rank_correlations",
    "regret",
    "score_percentile",
    "sequences_of_length",
    "sign_flip_p_value",
]
