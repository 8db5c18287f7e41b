"""The end-to-end selector: a pointer network over embeddings that a CLIP with adapters makes of images and texts."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from .configuration_clip_selector import ClipSelectorConfig
from .modeling_pointer_selector import PointerSelector
from .modeling_selector import CandidateEncoding, SelectionOutput, SelectorOutput


class ClipSelector(PointerSelector):
    r"""
    A [`PointerSelector`] that makes the embeddings it reads: by the encoders of CLIP (Radford et al., 2021), whose
    weights are frozen, with low-rank adapters (Hu et al., 2022) that are trained with the pointer network.

    In the place of embeddings it is given *item numbers*, and beside them the items: each image and each text of a
    batch once, however many rows, queries or pools hold it. They are encoded once per forward pass and brought to unit
    length, as the embeddings of [`encode_images`] and [`encode_texts`] are. A row without an image has the item number
    -1 there, and an embedding of zeros.

    Embeddings are refused in their place: they would pass the adapters by. Only where the candidates come as what
    [`~SelectorModel.encode_candidates`] makes of [`~ClipSelector.embed`], a large set of them embedded once, the
    queries are embeddings too.

    Args:
        config ([`ClipSelectorConfig`]):
            What the selector is made of.

    Example:

    ```python
    >>> import torch
    >>> from transformers import CLIPConfig
    >>> from lever_grpo.models import ClipSelector, ClipSelectorConfig

    >>> small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> text = {"vocab_size": 20, "eos_token_id": 1, **small}
    >>> vision = {"image_size": 8, "patch_size": 4, **small}
    >>> clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    >>> selector = ClipSelector(ClipSelectorConfig(clip_config=clip, hidden_dim=16, lora_rank=2)).eval()
    >>> picks = selector.select(
    ...     query_embeds=torch.tensor([[0, 0]]),  # one query: image 0, text 0
    ...     candidate_embeds=torch.tensor([[0, 1], [1, 2], [-1, 3]]),  # the first has the same image, the last none
    ...     num_shots=2,
    ...     pixel_values=torch.rand(2, 3, 8, 8),
    ...     input_ids=torch.tensor([[5, 1], [6, 1], [7, 1], [8, 1]]),
    ... )
    >>> picks.sequences.shape
    torch.Size([1, 1, 2])

    ```
    """

    config: ClipSelectorConfig
    config_class = ClipSelectorConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["AttentionLayer", "CLIPEncoderLayer"]

    def __init__(self, config: ClipSelectorConfig):
        super().__init__(config)
        clip: Any = config.clip_config
        self.encoders = nn.ModuleDict()
        if "image" in config.modalities:
            self.encoders["image"] = CLIPVisionModelWithProjection(clip.vision_config)
        if "text" in config.modalities:
            self.encoders["text"] = CLIPTextModelWithProjection(clip.text_config)
        if config.lora_rank:
            from peft import LoraConfig, inject_adapter_in_model

            lora = LoraConfig(
                r=config.lora_rank,
                lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a number like any other to peft
                lora_dropout=config.lora_dropout,
                target_modules=config.lora_target_modules,
            )
            inject_adapter_in_model(lora, self.encoders)
        self._freeze_encoders()

    def _freeze_encoders(self) -> None:
        for name, parameter in self.encoders.named_parameters():
            parameter.requires_grad_("lora_" in name)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of any model; the encoders come back frozen, which a checkpoint does not say of its weights."""
        loaded = super().from_pretrained(*args, **kwargs)
        selector = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        selector._freeze_encoders()
        return loaded

    @classmethod
    def from_clip(cls, clip: str | os.PathLike | CLIPModel, **options: Any) -> ClipSelector:
        """
        An untrained selector on the encoders of a CLIP.

        Args:
            clip (`str`, `Path` or `CLIPModel`):
                Folder or Hub id of a checkpoint (safetensors), or a model, whose weights are copied.
            **options:
                Of [`ClipSelectorConfig`].

        Example:

        ```python
        >>> from lever_grpo.models import ClipSelector
        >>> selector = ClipSelector.from_clip("openai/clip-vit-base-patch32", lora_rank=16)  # doctest: +SKIP

        ```
        """
        if not isinstance(clip, CLIPModel):
            options = {"clip_name": str(clip), **options}
            clip = CLIPModel.from_pretrained(clip, dtype=torch.float32, use_safetensors=True)
        selector = cls(cls.config_class(clip_config=clip.config, **options))
        weights = clip.state_dict()
        with torch.no_grad():
            for encoder in selector.encoders.values():
                for name, parameter in encoder.named_parameters():
                    if "lora_" not in name:
                        parameter.copy_(weights[name.replace(".base_layer", "")])
        return selector

    # ---- items ----

    def embed(
        self,
        numbers: Tensor,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """
        Embeddings of rows.

        Args:
            numbers (`torch.Tensor` of shape `(N, M)`):
                Which items the rows have, a column for each of `config.modalities`; -1 where a row lacks it.
            pixel_values (`torch.Tensor` of shape `(I, 3, h, w)`, *optional*):
                The different images. Not needed without the modality `"image"`.
            input_ids (`torch.Tensor` of shape `(J, L)`, *optional*):
                The different texts. Not needed without the modality `"text"`.
            attention_mask (`torch.Tensor` of shape `(J, L)`, *optional*):
                0 where a text is padded, on the right.

        Returns:
            `torch.Tensor` of shape `(N, D)`: its parts have unit length, or are zeros where a row lacks the item.

        Raises:
            ValueError: if `numbers` are no item numbers for these modalities, or the items are missing.
        """
        self._check_numbers(numbers)
        items: dict[str, tuple[str, Tensor | None, dict[str, Any]]] = {
            "image": ("pixel_values", pixel_values, {"pixel_values": pixel_values}),
            "text": ("input_ids", input_ids, {"input_ids": input_ids, "attention_mask": attention_mask}),
        }
        parts = []
        for modality, places in zip(self.config.modalities, numbers.unbind(-1), strict=True):
            name, values, inputs = items[modality]
            if values is None:
                raise ValueError(f"query_embeds and candidate_embeds are item numbers, and {name} is None; give it.")
            table = values.new_zeros(1, self.config.query_features[modality], dtype=self.dtype)
            if len(values):
                encoded = getattr(self.encoders[modality](**inputs), f"{modality}_embeds").to(self.dtype)  # (I, D)
                table = torch.cat([F.normalize(encoded, dim=-1), table])
            parts.append(table[places])  # -1 is the last row, the zeros
        return torch.cat(parts, dim=-1)

    def _check_numbers(self, numbers: Tensor) -> None:
        modalities = self.config.modalities
        if numbers.is_floating_point():
            raise ValueError(
                f"query_embeds and candidate_embeds are item numbers, and {numbers.dtype} was given: this selector "
                "embeds images and texts itself, and embeddings would pass its adapters by; give it what a "
                "DataCollatorForRawBeams makes of the rows."
            )
        if numbers.shape[-1] != len(modalities):
            raise ValueError(
                f"item numbers are {numbers.dtype} of shape {tuple(numbers.shape)}, expected whole numbers in "
                f"{len(modalities)} columns, for {modalities}; give the collator the modalities of the selector."
            )

    def _embeds(
        self, query: Tensor, candidates: Tensor | CandidateEncoding, items: dict[str, Tensor | None]
    ) -> tuple[Tensor, Tensor | CandidateEncoding]:
        """Embeddings of queries and candidates, of one pass of the encoders."""
        if isinstance(candidates, CandidateEncoding):  # of `embed`, and so are the queries
            return query, candidates
        for numbers in (query, candidates):
            self._check_numbers(numbers)
        shape = candidates.shape[:-1]
        embeds = self.embed(torch.cat([query, candidates.flatten(0, -2)]), **items)
        return embeds[: len(query)], embeds[len(query) :].unflatten(0, shape)

    def forward(
        self,
        query_embeds: Tensor,
        candidate_embeds: Tensor | CandidateEncoding,
        *args: Any,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SelectorOutput:
        """
        Log-probabilities of given sequences.

        Args:
            query_embeds (`torch.Tensor` of shape `(B, M)`):
                Item numbers, as in [`~ClipSelector.embed`].
            candidate_embeds (`torch.Tensor` of shape `(B, K, M)` or `(U, M)`):
                The same of each query's pool, or of U candidates that the queries share. Or what
                [`~SelectorModel.encode_candidates`] makes of their embeddings; `query_embeds` are then embeddings.
            pixel_values, input_ids, attention_mask:
                The items, as in [`~ClipSelector.embed`].
            *args, **kwargs:
                As in [`~SelectorModel.forward`].

        Raises:
            ValueError: as [`~SelectorModel.forward`] and [`~ClipSelector.embed`].
        """
        items = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return super().forward(*self._embeds(query_embeds, candidate_embeds, items), *args, **kwargs)

    @torch.no_grad()
    def select(
        self,
        query_embeds: Tensor,
        candidate_embeds: Tensor | CandidateEncoding,
        *args: Any,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> SelectionOutput:
        """Picks demonstrations; items as in [`~ClipSelector.forward`], the rest as in [`~SelectorModel.select`]."""
        items = {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}
        return super().select(*self._embeds(query_embeds, candidate_embeds, items), *args, **kwargs)
