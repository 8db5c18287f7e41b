"""Configuration of the GPT-2 selector and its named preset."""

from typing import Any, ClassVar

from .configuration_selector import SelectorConfig


class GPT2SelectorConfig(SelectorConfig):
    r"""
    Configuration of a [`GPT2Selector`]. Its `hidden_dim` is GPT-2's width and `dropout` that of all of GPT-2.

    Args:
        num_layers (`int`, *optional*, defaults to `2`):
            Number of GPT-2's layers.
        num_attention_heads (`int`, *optional*, defaults to `4`):
            Heads of each layer; must divide `hidden_dim`.
        scale_logits (`bool`, *optional*, defaults to `True`):
            Whether to divide the products of hidden state and candidate by \\( \sqrt{H} \\), so that training from
            scratch starts near the uniform policy at any width. A converted Lever-LM does not.
        **kwargs:
            What all selectors share: see [`SelectorConfig`]. `max_shots` also is the longest sequence that there are
            position embeddings for.

    Raises:
        ValueError: as [`SelectorConfig`], and for a `hidden_dim` that the heads do not divide.

    Example:

    ```python
    >>> from lever_grpo.models import GPT2SelectorConfig

    >>> config = GPT2SelectorConfig.from_preset("v0", embed_dim=384, hidden_dim=128)
    >>> config.num_layers, config.num_attention_heads, config.candidate_features
    (2, 4, {'embedding': 384})

    ```
    """

    model_type = "gpt2_selector"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"v0": {}}

    num_layers: int = 2
    num_attention_heads: int = 4
    scale_logits: bool = True

    def _check(self) -> None:
        super()._check()
        for name in ("num_attention_heads", "num_layers"):
            self._at_least(name, 1)
        self._heads_fit()
