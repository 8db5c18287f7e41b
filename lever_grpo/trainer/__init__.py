"""Trainers, their arguments, and the callbacks that drive them."""

from .answer_agreement import fit_answer_agreement
from .callbacks import CurriculumCallback, KLBetaCallback, PolicyControl, TemperatureCallback
from .checkpoints import last_checkpoint
from .group_beam_grpo_config import GroupBeamGRPOConfig
from .group_beam_grpo_trainer import GroupBeamGRPOTrainer
from .selector_config import SelectorTrainingArguments
from .selector_trainer import SelectorTrainer
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
    "fit_answer_agreement",
    "last_checkpoint",
]
