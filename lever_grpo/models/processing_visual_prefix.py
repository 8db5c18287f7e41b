"""Prompts with images as a visual prefix model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin


class VisualPrefixProcessor(ProcessorMixin):
    """
    Tokens of texts and features of images for a [`VisualPrefixForConditionalGeneration`].

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The language model's own.
        vocab_size (`int`):
            Size of the language model's vocabulary: the tokens of images come after it.
        num_image_tokens (`int`, *optional*, defaults to `2`):
            Soft tokens of an image.
        image_encoder (`str`, *optional*):
            Encoder of [`encode_images`]: a folder or a Hub id; by default the packaged EfficientNet-lite0.

    Example:

    ```python
    >>> from lever_grpo.models import VisualPrefixProcessor
    >>> from transformers import AutoTokenizer
    >>> tokenizer = AutoTokenizer.from_pretrained("HuggingFaceTB/SmolLM2-135M")  # doctest: +SKIP
    >>> processor = VisualPrefixProcessor(tokenizer, vocab_size=49152)  # doctest: +SKIP
    >>> inputs = processor(images=["shapes.png"], text=["<image>what shape is this?"])  # doctest: +SKIP

    ```
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"
    image_token = "<image>"

    def __init__(
        self,
        tokenizer: Any = None,
        vocab_size: int = 0,
        num_image_tokens: int = 2,
        image_encoder: str | None = None,
        **kwargs: Any,
    ):
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}: give that of the language model's embeddings.")
        super().__init__(tokenizer, **kwargs)
        self.vocab_size, self.num_image_tokens, self.image_encoder = vocab_size, num_image_tokens, image_encoder

    def __call__(self, images: Sequence[Any] | None = None, text: str | Sequence[str] | None = None) -> BatchFeature:
        """
        Texts, padded on the left, in which `<image>` stands for the next of the images.

        Args:
            images (`list`, *optional*):
                Paths, encoded bytes or `PIL` images, in the order of their marks.
            text (`str` or `list[str]`):
                Prompts.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` of shape (B, L) and, with images, `image_features` (N, F).

        Raises:
            ValueError: if there are not as many images as marks, or there is no text.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        images = list(images or [])
        marks = sum(text.count(self.image_token) for text in texts)
        if not texts or marks != len(images):
            raise ValueError(
                f"{len(texts)} texts with {marks} marks {self.image_token!r} and {len(images)} images: give a text, "
                "and one image for each mark, in their order."
            )
        rows: list[list[int]] = []
        number = 0
        for prompt in texts:
            first, *rest = prompt.split(self.image_token)
            ids = self._ids(first)
            for part in rest:
                ids += self.image_tokens(number) + self._ids(part)
                number += 1
            rows.append(ids)
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id or 0
        inputs = {
            "input_ids": torch.tensor([[pad] * (width - len(ids)) + ids for ids in rows]),
            "attention_mask": torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows]),
        }
        if images:
            inputs["image_features"] = self.image_features(images)
        return BatchFeature(inputs)

    def image_tokens(self, number: int) -> list[int]:
        """Token ids of an image of a call, by its number."""
        start = self.vocab_size + number * self.num_image_tokens
        return list(range(start, start + self.num_image_tokens))

    def image_features(self, images: Sequence[Any], device: str | torch.device | None = None) -> torch.Tensor:
        """Features of images, (N, F): one by one, so that those of an image are the same beside whatever others."""
        from ..search.encoders import encode_images

        return torch.from_numpy(encode_images(images, self.image_encoder, batch_size=1, device=device))

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **kwargs)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids if text else []
