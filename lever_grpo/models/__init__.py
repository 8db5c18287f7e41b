"""Selectors: policies over sequences of demonstrations."""

from transformers import AutoConfig, AutoModel

from .configuration_pointer_selector import PRESETS, PointerSelectorConfig
from .modeling_pointer_selector import PointerSelector, PointerSelectorOutput, SelectionOutput


AutoConfig.register(PointerSelectorConfig.model_type, PointerSelectorConfig, exist_ok=True)
AutoModel.register(PointerSelectorConfig, PointerSelector, exist_ok=True)

__all__ = ["PRESETS", "PointerSelector", "PointerSelectorConfig", "PointerSelectorOutput", "SelectionOutput"]
