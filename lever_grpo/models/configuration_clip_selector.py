"""Configuration of the end-to-end selector: a CLIP with adapters, and a pointer network over its embeddings."""

import copy
from typing import Any, ClassVar

from transformers import CLIPConfig

from .configuration_pointer_selector import PointerSelectorConfig


class ClipSelectorConfig(PointerSelectorConfig):
    r"""
    Configuration of a [`ClipSelector`].

    The features of queries and candidates are those that CLIP makes, `"image"` and `"text"`, each as wide as its
    projection; they are not given.

    Args:
        clip_config (`CLIPConfig` or `dict`, *optional*):
            Configuration of the encoders. By default that of CLIP ViT-B/32.
        clip_name (`str`, *optional*):
            Where the weights of the encoders came from, and with them their processor: a folder or a Hub id.
        modalities (`list[str]`, *optional*, defaults to `["image", "text"]`):
            What rows are seen by: both, or one of them. There is no encoder of the other.
        lora_rank (`int`, *optional*, defaults to `8`):
            Rank of the adapters. Raising it lets the encoders change more. 0: they have none and stay as they are.
        lora_alpha (`float`, *optional*, defaults to `16.0`):
            What adapters add is multiplied by `lora_alpha / lora_rank`. Above 0.
        lora_dropout (`float`, *optional*, defaults to `0.1`):
            Dropout of the adapters' input. In `[0, 1)`.
        lora_target_modules (`list[str]`, *optional*, defaults to `["q_proj", "v_proj"]`):
            Names of the encoders' layers that have adapters.
        **kwargs:
            Those of the pointer network: see [`PointerSelectorConfig`].

    Raises:
        ValueError: as [`PointerSelectorConfig`]; for unknown modalities, a number outside its range, or features that
            are not CLIP's.

    Example:

    ```python
    >>> from lever_grpo.models import ClipSelectorConfig

    >>> config = ClipSelectorConfig.from_preset("v2_lora", modalities=["text"], hidden_dim=128)
    >>> config.lora_rank, config.query_features
    (8, {'text': 512})

    ```
    """

    model_type = "clip_selector"
    sub_configs = {"clip_config": CLIPConfig}
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "v2_lora": {"encoder": "cross_attention", "state_update": "gated", "lora_rank": 8},
    }

    # None until __post_init__, which fills them in
    clip_config: CLIPConfig = None  # type: ignore[assignment]
    clip_name: str | None = None
    modalities: list[str] = None  # type: ignore[assignment]
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.1
    lora_target_modules: list[str] = None  # type: ignore[assignment]

    def __post_init__(self, **kwargs):
        given: Any = self.clip_config
        clip: Any = CLIPConfig(**given) if isinstance(given, dict) else copy.deepcopy(given or CLIPConfig())
        for part in (clip.vision_config, clip.text_config):
            part.projection_dim = clip.projection_dim  # that of the whole decides, as in a CLIPModel
        self.clip_config = clip
        self.modalities = ["image", "text"] if self.modalities is None else list(self.modalities)
        self.lora_target_modules = list(self.lora_target_modules or ["q_proj", "v_proj"])
        if self.modalities not in (["image", "text"], ["image"], ["text"]):
            raise ValueError(f"modalities={self.modalities}: must be ['image', 'text'], ['image'] or ['text'].")
        features = dict.fromkeys(self.modalities, clip.projection_dim)
        for side in ("query_features", "candidate_features"):
            if (getattr(self, side) or features) != features:
                raise ValueError(
                    f"{side}={getattr(self, side)}: this selector sees rows by what CLIP makes of them, "
                    f"{features}; leave it out."
                )
            setattr(self, side, dict(features))
        super().__post_init__(**kwargs)

    def _check(self) -> None:
        super()._check()
        self._at_least("lora_rank", 0)
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha={self.lora_alpha}: must be above 0; for no adapters, set lora_rank=0.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be in [0, 1).")
