"""The search for demonstrations: encoders, candidate pools, and the beam search over them."""

from .beam_search import SearchConfig, beam_search
from .encoders import default_text_encoder, encode_images, encode_texts
from .judges import answer_accuracy, make_judge
from .samplers import sample_pools


__all__ = [
    "SearchConfig",
    "answer_accuracy",
    "beam_search",
    "default_text_encoder",
    "encode_images",
    "encode_texts",
    "make_judge",
    "sample_pools",
]
