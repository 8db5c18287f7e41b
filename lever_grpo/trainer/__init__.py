"""Trainers, their arguments, and the callbacks that drive them."""

from .callbacks import CurriculumCallback, KLBetaCallback, PolicyControl, TemperatureCallback
from .group_beam_grpo_config import GroupBeamGRPOConfig
from .group_beam_grpo_trainer import GroupBeamGRPOTrainer
from .selector_trainer import SelectorTrainer, SelectorTrainingArguments
from .sft_trainer import SelectorSFTConfig, SelectorSFTTrainer


__all__ = [
    "CurriculumCallback",
    "GroupBeamGRPOConfig",
    "GroupBeamGRPOTrainer",
    "KLBetaCallback",
    "PolicyControl",
    "SelectorSFTConfig",
    "SelectorSFTTrainer",
    "SelectorTrainer",
    "SelectorTrainingArguments",
    "TemperatureCallback",
]
