"""Configuration of the selectors of the public Lever-Plus code."""

from typing import Any, ClassVar

from .configuration_selector import SelectorConfig


VERSIONS = ("v1", "v2")
PICK_UPDATES = ("none", "average", "weighted", "gated")


class LeverPlusSelectorConfig(SelectorConfig):
    r"""
    Configuration of a [`LeverPlusSelector`].

    Args:
        version (`str`, *optional*, defaults to `"v2"`):
            The network: `"v1"` (query and candidates are projected apart, each by two layers) or `"v2"` (the query
            also attends to its pool). Lever-Plus v3 is v2 after post-training.
        pick_update (`str`, *optional*, defaults to `"none"`):
            How the query's vector takes in a pick: `"none"` (it stays as it is: only what was picked is left out),
            `"average"` (the mean of the two), `"weighted"` (a mean with one learned weight) or `"gated"` (a learned
            weight for each dimension, which depends on the two).
        logit_temperature (`float`, *optional*, defaults to `0.1`):
            Divides the cosines, which gives the logits. Above 0; larger is more even.
        num_layers (`int`, *optional*, defaults to `1`):
            Number of attention layers of the query over its pool, with `"v2"`.
        num_attention_heads (`int`, *optional*, defaults to `1`):
            Heads of each of them; must divide `hidden_dim`.
        **kwargs:
            What all selectors share: see [`SelectorConfig`]. Neither `similarity_prior` nor `stop`.

    Raises:
        ValueError: as [`SelectorConfig`], and for `similarity_prior` or `stop`.

    Example:

    ```python
    >>> from lever_grpo.models import LeverPlusSelectorConfig

    >>> config = LeverPlusSelectorConfig.from_preset("lever-plus-v1", embed_dim=512, hidden_dim=512)
    >>> config.version, config.pick_update
    ('v1', 'average')

    ```
    """

    model_type = "lever_plus_selector"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "lever-plus-v1": {"version": "v1", "pick_update": "average"},
        "lever-plus-v2": {"version": "v2", "pick_update": "none"},
    }

    version: str = "v2"
    pick_update: str = "none"
    logit_temperature: float = 0.1
    num_layers: int = 1
    num_attention_heads: int = 1

    def _check(self) -> None:
        super()._check()
        self._one_of("version", VERSIONS)
        self._one_of("pick_update", PICK_UPDATES)
        for name in ("num_layers", "num_attention_heads"):
            self._at_least(name, 1)
        if not self.logit_temperature > 0:
            raise ValueError(f"logit_temperature={self.logit_temperature}: must be above 0.")
        self._heads_fit()
        for name in ("similarity_prior", "stop"):
            if getattr(self, name):
                raise ValueError(
                    f"{name}={getattr(self, name)}: a LeverPlusSelector has none; train a PointerSelector instead."
                )
