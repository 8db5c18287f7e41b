"""A small vision-language model from parts: image features become soft tokens of a frozen language model.

The recipe is that of "Multimodal Few-Shot Learning with Frozen Language Models" (Tsimpoukelli et al., 2021), with
pooled features of a frozen image encoder in the place of a trained one: only the projector between the two is trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)


class VisualPrefixConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VisualPrefixForConditionalGeneration`] and of its [`VisualPrefixProjector`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the language model. Not needed by a projector alone.
        feature_width (`int`, *optional*, defaults to `1280`):
            Width of an image's features.
        text_width (`int`, *optional*, defaults to `576`):
            Width of the language model's token embeddings.
        projector_width (`int`, *optional*, defaults to `512`):
            Width of the projector's hidden layer.
        num_image_tokens (`int`, *optional*, defaults to `2`):
            Soft tokens T of an image.
        image_encoder (`str`, *optional*):
            The encoder of [`encode_images`] whose features the projector was trained with: a folder or a Hub id; by
            default the packaged EfficientNet-lite0.

    Raises:
        ValueError: if `text_width` is not that of the language model, or there is no token.

    Example:

    ```python
    >>> from lever_grpo.models import VisualPrefixConfig
    >>> VisualPrefixConfig(num_image_tokens=4).feature_width
    1280

    ```
    """

    model_type = "visual_prefix"
    sub_configs = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        feature_width: int = 1280,
        text_width: int = 576,
        projector_width: int = 512,
        num_image_tokens: int = 2,
        image_encoder: str | None = None,
        **kwargs: Any,
    ):
        if num_image_tokens < 1:
            raise ValueError(f"num_image_tokens={num_image_tokens}: an image needs at least 1.")
        if isinstance(text_config, dict):
            text_config = CONFIG_MAPPING[text_config["model_type"]](**text_config)
        if text_config is not None and text_config.hidden_size != text_width:
            raise ValueError(
                f"text_width={text_width}: the language model's embeddings are {text_config.hidden_size} wide, and so "
                "must the projector's soft tokens be."
            )
        self.text_config = text_config
        self.feature_width = feature_width
        self.text_width = text_width
        self.projector_width = projector_width
        self.num_image_tokens = num_image_tokens
        self.image_encoder = image_encoder
        super().__init__(**kwargs)


class VisualPrefixProjector(PreTrainedModel):
    """
    Image features to soft tokens; all that is trained of a visual prefix model, and what is saved of it.

    Args:
        config ([`VisualPrefixConfig`]):
            Widths.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo.models import VisualPrefixConfig, VisualPrefixProjector
    >>> projector = VisualPrefixProjector(VisualPrefixConfig(feature_width=8, text_width=4))
    >>> projector(torch.zeros(3, 8)).shape
    torch.Size([3, 2, 4])

    ```
    """

    config_class = VisualPrefixConfig
    main_input_name = "image_features"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True  # it has no attention: any will do
    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: VisualPrefixConfig):
        super().__init__(config)
        width = config.feature_width
        # features stand on their own scales, and what tells images apart is small beside what they share
        self.register_buffer("feature_mean", torch.zeros(width))
        self.register_buffer("feature_std", torch.ones(width))
        self.hidden = nn.Linear(width, config.projector_width)
        self.output = nn.Linear(config.projector_width, config.num_image_tokens * config.text_width)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            # soft tokens as large as token embeddings are
            nn.init.normal_(module.weight, std=(0.1 if module is self.output else 1.0) * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
        elif module is self:
            nn.init.zeros_(self.feature_mean)
            nn.init.ones_(self.feature_std)

    def forward(self, image_features: Tensor) -> Tensor:
        """Features (N, F) to soft tokens (N, T, H)."""
        scaled = (image_features.to(self.feature_mean) - self.feature_mean) / self.feature_std
        soft = self.output(nn.functional.gelu(self.hidden(scaled)))
        return soft.unflatten(-1, (self.config.num_image_tokens, self.config.text_width))


class VisualPrefixForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """
    A frozen language model that reads images as soft tokens.

    Image `n` of a call is the token ids \\( V + nT, \\dots, V + nT + T - 1 \\) of `input_ids`, where V is the size of
    the language model's vocabulary: so images stand anywhere in a prompt, any number of times, and each is projected
    once. [`VisualPrefixProcessor`] writes them in the place of `<image>`.

    Args:
        config ([`VisualPrefixConfig`]):
            With a `text_config`.

    Example:

    ```python
    >>> from lever_grpo.models import VisualPrefixForConditionalGeneration, VisualPrefixProjector
    >>> from transformers import AutoModelForCausalLM
    >>> language_model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    >>> projector = VisualPrefixProjector.from_pretrained("my_projector")  # doctest: +SKIP
    >>> model = VisualPrefixForConditionalGeneration.from_parts(language_model, projector)  # doctest: +SKIP

    ```
    """

    config_class = VisualPrefixConfig
    base_model_prefix = ""
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules: list[str] = []

    def __init__(self, config: VisualPrefixConfig, language_model: Any = None):
        if config.text_config is None:
            raise ValueError(
                "text_config=None: the folder holds a projector alone; load it by VisualPrefixProjector and join it "
                "with a language model by from_parts."
            )
        super().__init__(config)
        self.projector = VisualPrefixProjector(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.language_model = language_model
        self.generation_config = language_model.generation_config
        self.post_init()

    @classmethod
    def from_parts(cls, language_model: Any, projector: VisualPrefixProjector) -> VisualPrefixForConditionalGeneration:
        """The two parts as one model; neither is copied. The language model is frozen, and decides on the dtype."""
        options = {
            name: getattr(projector.config, name)
            for name in ("feature_width", "text_width", "projector_width", "num_image_tokens", "image_encoder")
        }
        attention = language_model.config._attn_implementation  # a config hands its own down to its parts
        config = VisualPrefixConfig(text_config=language_model.config, attn_implementation=attention, **options)
        with torch.device("meta"):  # the projector that __init__ makes is thrown away
            model = cls(config, language_model)
        model.projector = projector.to(language_model.device)
        language_model.requires_grad_(False)
        return model

    @property
    def dtype(self) -> torch.dtype:
        """That of the language model; the projector may be finer."""
        return self.language_model.dtype

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        What the language model makes of the tokens; all further arguments (`labels`, `past_key_values`, …) are its.

        Args:
            input_ids (`torch.Tensor` of shape `(B, L)`):
                Tokens, those of images among them.
            image_features (`torch.Tensor` of shape `(N, F)`, *optional*):
                The images of the call.

        Raises:
            ValueError: if a token belongs to an image that is not there.
        """
        text_tokens = self.config.text_config.vocab_size
        soft = input_ids >= text_tokens
        images = 0 if image_features is None else len(image_features)
        if soft.any() and int(input_ids.max()) >= text_tokens + images * self.config.num_image_tokens:
            raise ValueError(
                f"input_ids hold the token {int(input_ids.max())}, and with {images} images of "
                f"{self.config.num_image_tokens} tokens the last is "
                f"{text_tokens + images * self.config.num_image_tokens - 1}; give the features of all images."
            )
        embeds = self.get_input_embeddings()(input_ids.masked_fill(soft, 0))
        if image_features is not None and soft.any():
            table = self.projector(image_features).flatten(0, 1).to(embeds.dtype)  # (N * T, H)
            embeds = embeds.masked_scatter(soft[..., None], table[input_ids[soft] - text_tokens])
        return self.language_model(
            inputs_embeds=embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )
