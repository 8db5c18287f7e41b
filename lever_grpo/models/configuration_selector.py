"""What the configurations of all selectors share: the features they read, the similarity prior, the action to stop."""

import json
from typing import Any, ClassVar

from transformers import PreTrainedConfig


MAX_SIZE = 1_000_000  # of any width or number in a configuration, which may come from elsewhere
MAX_LAYERS = 256


class SelectorConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SelectorModel`]: what selectors of every kind have in common.

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
        dropout (`float`, *optional*, defaults to `0.1`):
            Dropout inside the network. In `[0, 1)`.
        stop (`bool`, *optional*, defaults to `False`):
            Whether the policy may end a sequence before `max_shots`: after each pick it decides, by what it has
            picked, whether that is enough.
        max_shots (`int`, *optional*, defaults to `8`):
            The most demonstrations that a sequence can have. With `stop`, a sequence of this length ends unasked.
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
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}  # name of a version: its options

    embed_dim: int = 768
    hidden_dim: int = 256
    # None until __post_init__, which fills them in
    query_features: dict[str, int] = None  # type: ignore[assignment]
    candidate_features: dict[str, int] = None  # type: ignore[assignment]
    dropout: float = 0.1
    stop: bool = False
    max_shots: int = 8
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
    def from_preset(cls, preset: str, **kwargs):
        """
        The configuration of a named version, with `kwargs` on top. Of any kind of selector: [`config_from_preset`].

        Args:
            preset (`str`):
                One of this class's `presets`.
            **kwargs:
                Any argument of the class.
        """
        if preset not in cls.presets:
            raise ValueError(f"preset={preset!r} is unknown; the presets are {', '.join(cls.presets)}.")
        return cls(**{**cls.presets[preset], **kwargs})

    def to_json_string(self, use_diff: bool = True) -> str:
        # The base class sorts keys at every depth. The order of features is that of the columns of the embeddings,
        # and the order of pairs that of the prior's weights: they must come back as they were.
        config = json.loads(super().to_json_string(use_diff))
        for name in ("query_features", "candidate_features", "prior_pairs"):
            config[name] = getattr(self, name)
        return json.dumps(config, indent=2) + "\n"

    def _check(self) -> None:
        for name, lowest in (("hidden_dim", 1), ("max_shots", 1), ("prior_rank", 0)):
            self._at_least(name, lowest)
        for name in ("num_layers", "num_set_layers"):
            if getattr(self, name, 0) > MAX_LAYERS:
                raise ValueError(f"{name}={getattr(self, name)}: must be at most {MAX_LAYERS}.")
        for name in ("dropout", "prior_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be in [0, 1).")
        if not self.prior_scale > 0:
            raise ValueError(f"prior_scale={self.prior_scale}: must be above 0; its logarithm is what is learned.")
        for side in ("query_features", "candidate_features"):
            for name, width in getattr(self, side).items():
                if not isinstance(width, int) or width < 1:
                    raise ValueError(f"{side}[{name!r}]={width!r}: a width is at least 1, a whole number.")
                if ":" in name or "." in name:
                    raise ValueError(f"{side} has the name {name!r}: names hold neither ':' nor '.'; rename it.")
        if not self.similarity_prior:
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

    def _at_least(self, name: str, lowest: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or not lowest <= value <= MAX_SIZE:
            raise ValueError(f"{name}={value!r}: must be at least {lowest}, a whole number, at most {MAX_SIZE:,}.")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}.")

    def _heads_fit(self) -> None:
        """Of kinds with attention."""
        heads = self.num_attention_heads
        if self.hidden_dim % heads:
            raise ValueError(
                f"hidden_dim={self.hidden_dim} is not a multiple of num_attention_heads={heads}; change one of them."
            )
