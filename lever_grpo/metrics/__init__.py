"""How good a selector's choices are, and how sure one can be of it (numpy only; imports nothing of this package)."""

from .answers import exact_match, normalize_vqa_answer, token_f1, vqa_accuracy
from .bootstrap import Interval, mean_interval, paired_interval, pooled_interval, sign_flip_p_value
from .calibration import CalibrationBin, calibration_curve, calibration_error, matched_temperature
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
    "CalibrationBin",
    "Interval",
    "calibration_curve",
    "calibration_error",
    "changed_share",
    "cider",
    "exact_match",
    "expected_reward",
    "gap_closed",
    "lookup_reward",
    "matched_temperature",
    "mean_interval",
    "mid_ranks",
    "normalize_vqa_answer",
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
    "token_f1",
    "vqa_accuracy",
]
