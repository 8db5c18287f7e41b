"""Selectors: policies over sequences of demonstrations; and a small vision-language model from parts."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_pointer_selector import PRESETS, PointerSelectorConfig
from .modeling_pointer_selector import PointerSelector, PointerSelectorOutput, SelectionOutput
from .modeling_visual_prefix import (
    VisualPrefixConfig,
    VisualPrefixForConditionalGeneration,
    VisualPrefixProjector,
)
from .processing_visual_prefix import VisualPrefixProcessor


AutoConfig.register(PointerSelectorConfig.model_type, PointerSelectorConfig, exist_ok=True)
AutoModel.register(PointerSelectorConfig, PointerSelector, exist_ok=True)
AutoConfig.register(VisualPrefixConfig.model_type, VisualPrefixConfig, exist_ok=True)
AutoModelForImageTextToText.register(VisualPrefixConfig, VisualPrefixForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VisualPrefixConfig, VisualPrefixProcessor, exist_ok=True)

__all__ = [
    "PRESETS",
    "PointerSelector",
    "PointerSelectorConfig",
    "PointerSelectorOutput",
    "SelectionOutput",
    "VisualPrefixConfig",
    "VisualPrefixForConditionalGeneration",
    "VisualPrefixProcessor",
    "VisualPrefixProjector",
]
