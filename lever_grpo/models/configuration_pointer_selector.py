"""Configuration of the pointer selector and its named presets."""

from typing import Any, ClassVar

from .configuration_selector import SelectorConfig
from .decoder_terms import TERMS


ENCODERS = ("none", "bi_encoder", "cross_attention")
STATE_UPDATES = ("additive", "gated", "gru")
SCORINGS = ("bilinear", "additive")


class PointerSelectorConfig(SelectorConfig):
    r"""
    Configuration of a [`PointerSelector`].

    Args:
        encoder (`str`, *optional*, defaults to `"cross_attention"`):
            `"bi_encoder"`: query and candidates are projected apart; `"cross_attention"`: the query also attends to
            its pool; `"none"`: no network at all, the prior alone decides.
        state_update (`str`, *optional*, defaults to `"gated"`):
            How the decoder's state takes in what was picked: `"additive"` (the query plus a learned projection of the
            pick), `"gated"` (a learned gate between the old state and a proposal) or `"gru"` (a gated recurrent unit,
            whose proposal also forgets by a gate).
        scoring (`str`, *optional*, defaults to `"bilinear"`):
            What makes a logit of the state and a candidate: `"bilinear"` (a product by a learned matrix) or
            `"additive"` (one hidden layer over both; Bahdanau et al., 2015).
        decoder_terms (`list[str]`, *optional*):
            What is added to the logits after the first pick, in view of what was picked: `"mmr"`, `"coverage"`,
            `"dpp"`; see [`MMRTerm`], [`CoverageTerm`], [`DPPTerm`]. Each starts at weight zero: it changes nothing
            until it is trained.
        term_rank (`int`, *optional*, defaults to `32`):
            Width of the representation, or number of the prototypes, that each of `decoder_terms` learns.
        num_layers (`int`, *optional*, defaults to `1`):
            Number of cross-attention layers of the query over its pool.
        num_set_layers (`int`, *optional*, defaults to `0`):
            Number of self-attention layers among the candidates of a pool, each of which sees the query: a candidate
            can then be judged by the others (say, by how many near ones share its answer).
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of each cross-attention layer; must divide `hidden_dim`.
        **kwargs:
            What all selectors share: see [`SelectorConfig`].

    Raises:
        ValueError: as [`SelectorConfig`], and for a network's option where `encoder="none"` leaves no network.

    Example:

    ```python
    >>> from lever_grpo import PointerSelectorConfig

    >>> config = PointerSelectorConfig.from_preset("v3", embed_dim=384, similarity_prior=True)
    >>> config.encoder, config.query_features
    ('cross_attention', {'embedding': 384})

    ```
    """

    model_type = "pointer_selector"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "prior": {"encoder": "none", "similarity_prior": True},
        "v1": {"encoder": "bi_encoder", "state_update": "additive"},
        "v2": {"encoder": "cross_attention", "state_update": "gated"},
        # v3 is v2's network after post-training; the two share one architecture, so that a v2 checkpoint is its start
        "v3": {"encoder": "cross_attention", "state_update": "gated"},
    }

    encoder: str = "cross_attention"
    state_update: str = "gated"
    scoring: str = "bilinear"
    decoder_terms: list[str] = None  # type: ignore[assignment]
    term_rank: int = 32
    num_layers: int = 1
    num_set_layers: int = 0
    num_attention_heads: int = 4

    def __post_init__(self, **kwargs):
        self.decoder_terms = list(self.decoder_terms or [])
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        self._one_of("encoder", ENCODERS)
        self._one_of("state_update", STATE_UPDATES)
        self._one_of("scoring", SCORINGS)
        for name, lowest in (("num_attention_heads", 1), ("num_layers", 0), ("num_set_layers", 0), ("term_rank", 1)):
            self._at_least(name, lowest)
        unknown = [name for name in self.decoder_terms if name not in TERMS]
        if unknown or len(set(self.decoder_terms)) < len(self.decoder_terms):
            known = ", ".join(TERMS)
            raise ValueError(f"decoder_terms={self.decoder_terms}: must be among {known}, each once.")
        self._heads_fit()
        if self.encoder != "none":
            return
        if not self.similarity_prior:
            raise ValueError("encoder='none' leaves the prior alone to decide; set similarity_prior=True.")
        for name in ("decoder_terms", "stop"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} needs a network, and encoder='none' has none.")
