"""What a frozen model thinks of demonstrations: one protocol, several backends."""

from .causal_lm import CausalLMScorer
from .prompts import PromptTemplate
from .protocol import Prompt, Scorer, ScorerError
from .scores import SCORES, mean_log_prob
from .vision_language import VisionLanguageScorer
from .visual_prefix import VisualPrefixScorer
from .vllm import VLLMScorer


__all__ = [
    "SCORES",
    "CausalLMScorer",
    "Prompt",
    "PromptTemplate",
    "Scorer",
    "ScorerError",
    "VLLMScorer",
    "VisionLanguageScorer",
    "VisualPrefixScorer",
    "mean_log_prob",
]
