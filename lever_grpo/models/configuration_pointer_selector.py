"""Configuration of the pointer selector and its named presets."""

import json
from typing import Any

from transformers import PreTrainedConfig


ENCODERS = ("none", "bi_encoder", "cross_attention")
STATE_UPDATES = ("additive", "gated")

PRESETS: dict[str, dict[str, Any]] = {
    "v1": {"encoder": "bi_encoder", "state_update": "additive"},
    "v2": {"encoder": "cross_attention", "state_update": "gated"},
    # v3 is v2's network after post-training; the two share one architecture so that a v2 checkpoint is v3's start.
    "v3": {"encoder": "cross_attention", "state_update": "gated"},
}


class PointerSelectorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`PointerSelector`].

    Args:
        embed_dim (`int`, *optional*, defaults to `768`):
            Width of the query and candidate embeddings when both have a single, unnamed feature. Ignored when
            `query_features` and `candidate_features` are given.
        hidden_dim (`int`, *optional*, defaults to `256`):
            Width H of the network.
        query_features (`dict[str, int]`, *optional*):
            Names and widths of the embeddings that are concatenated, in this order, in `query_embeds`.
        candidate_features (`dict[str, int]`, *optional*):
            The same for `candidate_embeds`.
        encoder (`str`, *optional*, defaults to `"cross_attention"`):
            `"bi_encoder"`: query and candidates are projected apart; `"cross_attention"`: the query also attends to
            its pool; `"none"`: no network at all, the prior alone decides.
        state_update (`str`, *optional*, defaults to `"gated"`):
            How the decoder's state takes in what was picked: `"additive"` (the query plus a learned projection of the
            pick) or `"gated"` (a learned gate between the old state and a proposal).
        num_layers (`int`, *optional*, defaults to `1`):
            Number of cross-attention layers of the query over its pool.
        num_set_layers (`int`, *optional*, defaults to `0`):
            Number of self-attention layers among the candidates of a pool, each of which sees the query: a candidate
            can then be judged by the others (say, by how many near ones share its answer).
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of each cross-attention layer; must divide `hidden_dim`.
        dropout (`float`, *optional*, defaults to `0.1`):
            Dropout inside the network. In `[0, 1)`.
        similarity_prior (`bool`, *optional*, defaults to `False`):
            Whether the logits start at the scaled cosine of the given embeddings, so that the untrained selector *is*
            the similarity baseline and training learns a correction to it.
        prior_pairs (`dict[str, float]`, *optional*):
            Pairs `"query feature:candidate feature"` whose cosines the prior mixes, with their weights at the start.
            By default all pairs of equal widths: those of one name start with equal weights that sum to 1, the others
            at 0, for training to take in.
        prior_scale (`float`, *optional*, defaults to `20.0`):
            Factor from cosine to logit at the start (learned). Larger is greedier.
        prior_rank (`int`, *optional*, defaults to `32`):
            Rank of the learned change of the metric. 0 keeps the given embeddings as they are.
        prior_dropout (`float`, *optional*, defaults to `0.3`):
            Dropout inside the change of the metric. In `[0, 1)`.

    Raises:
        ValueError: for unknown names, a number outside its range, or a prior without a pair of equal widths.

    Example:

    ```python
    >>> from lever_grpo import PointerSelectorConfig

    >>> config = PointerSelectorConfig.from_preset("v3", embed_dim=384, similarity_prior=True)
    >>> config.encoder, config.query_features
    ('cross_attention', {'embedding': 384})

    ```
    """

    model_type = "pointer_selector"

    embed_dim: int = 768
    hidden_dim: int = 256
    # None until __post_init__, which fills them in
    query_features: dict[str, int] = None  # type: ignore[assignment]
    candidate_features: dict[str, int] = None  # type: ignore[assignment]
    encoder: str = "cross_attention"
    state_update: str = "gated"
    num_layers: int = 1
    num_set_layers: int = 0
    num_attention_heads: int = 4
    dropout: float = 0.1
    similarity_prior: bool = False
    prior_pairs: dict[str, float] = None  # type: ignore[assignment]
    prior_scale: float = 20.0
    prior_rank: int = 32
    prior_dropout: float = 0.3

    def __post_init__(self, **kwargs):
        self.query_features = dict(self.query_features or {"embedding": self.embed_dim})
        self.candidate_features = dict(self.candidate_features or {"embedding": self.embed_dim})
        if self.prior_pairs is None:
            shared = [
                name for name, width in self.query_features.items() if self.candidate_features.get(name) == width
            ]
            self.prior_pairs = {
                f"{query}:{candidate}": 1.0 / len(shared) if query == candidate else 0.0
                for query, width in self.query_features.items()
                for candidate, candidate_width in self.candidate_features.items()
                if shared and width == candidate_width
            }
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_preset(cls, preset: str, **kwargs) -> "PointerSelectorConfig":
        """
        The configuration of a named version, with `kwargs` on top.

        Args:
            preset (`str`):
                `"v1"` (bi-encoder, additive query update), `"v2"` or `"v3"` (cross-attention, gated state update).
            **kwargs:
                Any argument of [`PointerSelectorConfig`].
        """
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r} is unknown; the presets are {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[preset], **kwargs})

    def to_json_string(self, use_diff: bool = True) -> str:
        # The base class sorts keys at every depth. The order of features is that of the columns of the embeddings,
        # and the order of pairs that of the prior's weights: they must come back as they were.
        config = json.loads(super().to_json_string(use_diff))
        for name in ("query_features", "candidate_features", "prior_pairs"):
            config[name] = getattr(self, name)
        return json.dumps(config, indent=2) + "\n"

    def _check(self) -> None:
        for name, choices in (("encoder", ENCODERS), ("state_update", STATE_UPDATES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}.")
        for name, lowest in (("num_attention_heads", 1), ("num_layers", 0), ("num_set_layers", 0), ("prior_rank", 0)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least {lowest}.")
        for name in ("dropout", "prior_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1).")
        if not self.prior_scale > 0:
            raise ValueError(f"prior_scale={self.prior_scale}: must be above 0; its logarithm is what is learned.")
        if self.hidden_dim < 1 or self.hidden_dim % self.num_attention_heads:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} is not a multiple of num_attention_heads={self.num_attention_heads}; "
                "change one of them."
            )
        for side in ("query_features", "candidate_features"):
            for name, width in getattr(self, side).items():
                if width < 1:
                    raise ValueError(f"{side}[{name!r}]={width}: a width is at least 1.")
                if ":" in name or "." in name:
                    raise ValueError(f"{side} has the name {name!r}: names hold neither ':' nor '.'; rename it.")
        if not self.similarity_prior:
            if self.encoder == "none":
                raise ValueError("encoder='none' leaves the prior alone to decide; set similarity_prior=True.")
            return
        if not self.prior_pairs:
            raise ValueError(
                "similarity_prior=True, but query and candidates share no feature of one width "
                f"({self.query_features} and {self.candidate_features}); name the pairs to compare in prior_pairs."
            )
        for pair in self.prior_pairs:
            query, _, candidate = pair.partition(":")
            widths = (self.query_features.get(query), self.candidate_features.get(candidate))
            if None in widths or widths[0] != widths[1]:
                raise ValueError(
                    f"prior_pairs has {pair!r} with widths {widths[0]} and {widths[1]}: write "
                    "'query feature:candidate feature' with two features of one width."
                )
