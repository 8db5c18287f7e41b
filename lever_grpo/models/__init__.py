"""Selectors: policies over sequences of demonstrations; and a small vision-language model from parts."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .auto import PRESETS, SELECTORS, config_from_preset, load_selector
from .configuration_clip_selector import ClipSelectorConfig
from .configuration_gpt2_selector import GPT2SelectorConfig
from .configuration_lever_plus import LeverPlusSelectorConfig
from .configuration_pointer_selector import PointerSelectorConfig
from .configuration_selector import SelectorConfig
from .modeling_clip_selector import ClipSelector
from .modeling_gpt2_selector import GPT2Selector
from .modeling_lever_plus import LeverPlusSelector
from .modeling_pointer_selector import PointerSelector
from .modeling_selector import SelectionOutput, SelectorModel, SelectorOutput
from .modeling_visual_prefix import (
    VisualPrefixConfig,
    VisualPrefixForConditionalGeneration,
    VisualPrefixProjector,
)
from .processing_visual_prefix import VisualPrefixProcessor


for selector in SELECTORS:
    AutoConfig.register(selector.config_class.model_type, selector.config_class, exist_ok=True)
    AutoModel.register(selector.config_class, selector, exist_ok=True)
AutoConfig.register(VisualPrefixConfig.model_type, VisualPrefixConfig, exist_ok=True)
AutoModelForImageTextToText.register(VisualPrefixConfig, VisualPrefixForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VisualPrefixConfig, VisualPrefixProcessor, exist_ok=True)

__all__ = [
    "PRESETS",
    "SELECTORS",
    "ClipSelector",
    "ClipSelectorConfig",
    "GPT2Selector",
    "GPT2SelectorConfig",
    "LeverPlusSelector",
    "LeverPlusSelectorConfig",
    "PointerSelector",
    "PointerSelectorConfig",
    "SelectionOutput",
    "SelectorConfig",
    "SelectorModel",
    "SelectorOutput",
    "VisualPrefixConfig",
    "VisualPrefixForConditionalGeneration",
    "VisualPrefixProcessor",
    "VisualPrefixProjector",
    "config_from_preset",
    "load_selector",
]
