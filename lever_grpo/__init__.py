"""Post-train demonstration selectors for in-context learning on logged beams: RCE, then offline GRPO."""

import importlib
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0.dev0"

_MODULES = {
    "data": ["BeamJson", "DataCollatorForBeams", "EmbeddingStore", "load_beams", "load_sample", "split_by_query"],
    "inference": ["DemonstrationSelector"],
    "models": ["PointerSelector", "PointerSelectorConfig"],
    "objectives": ["clip_advantages", "compute_softmax_weights", "normalize_rewards_zscore"],
    "trainer": [
        "CurriculumCallback",
        "GroupBeamGRPOConfig",
        "GroupBeamGRPOTrainer",
        "KLBetaCallback",
        "PolicyControl",
        "SelectorSFTConfig",
        "SelectorSFTTrainer",
        "TemperatureCallback",
    ],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME)]

if TYPE_CHECKING:
    from .data import BeamJson, DataCollatorForBeams, EmbeddingStore, load_beams, load_sample, split_by_query
    from .inference import DemonstrationSelector
    from .models import PointerSelector, PointerSelectorConfig
    from .objectives import clip_advantages, compute_softmax_weights, normalize_rewards_zscore
    from .trainer import (
        CurriculumCallback,
        GroupBeamGRPOConfig,
        GroupBeamGRPOTrainer,
        KLBetaCallback,
        PolicyControl,
        SelectorSFTConfig,
        SelectorSFTTrainer,
        TemperatureCallback,
    )


def __getattr__(name: str) -> Any:
    # names are imported when they are first used: `lever-grpo --help` need not wait for torch
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
