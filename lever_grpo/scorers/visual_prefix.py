"""Scores and answers of a language model that reads images as soft tokens."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.examples import Example
from ..data.records import BeamDataError
from ..models import VisualPrefixForConditionalGeneration, VisualPrefixProcessor, VisualPrefixProjector
from .causal_lm import CausalLMScorer
from .loading import load_language_model
from .prompts import PromptTemplate
from .protocol import Prompt
from .tokens import PromptTokens


logger = logging.getLogger(__name__)
PACKAGED_PROJECTOR = Path(__file__).resolve().parents[1] / "sample" / "visual_prefix"


class VisualPrefixScorer(CausalLMScorer):
    """
    A visual prefix model as a [`Scorer`]: a [`CausalLMScorer`] in whose prompts an example's image, if it has one,
    stands in front of its question.

    Each image is encoded once, the first time a prompt holds it, and known by its content.

    Args:
        model ([`VisualPrefixForConditionalGeneration`]):
            Projector and language model.
        processor ([`VisualPrefixProcessor`]):
            Tokenizer and image encoder.
        template ([`PromptTemplate`], *optional*):
            How questions and answers become text.
        **options:
            Further arguments of [`CausalLMScorer`].

    Example:

    ```python
    >>> from pathlib import Path
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.scorers import Prompt, VisualPrefixScorer
    >>> scorer = VisualPrefixScorer.from_pretrained("SmolLM2", "projector")  # doctest: +SKIP
    >>> red = Example(0, "what color is the shape?", ("red",), image=Path("0.png"))
    >>> blue = Example(1, "what color is the shape?", ("blue",), image=Path("1.png"))
    >>> scorer.score([Prompt(blue), Prompt(blue, (red,))])  # doctest: +SKIP
    [array([-2.3]), array([-0.4])]

    ```
    """

    def __init__(
        self,
        model: VisualPrefixForConditionalGeneration,
        processor: VisualPrefixProcessor,
        template: PromptTemplate | None = None,
        **options: Any,
    ):
        self.processor = processor
        self._contents: dict[Path | bytes, str | None] = {}  # digests of images; None: cannot be read
        self._numbers: dict[str, int | None] = {}  # of their features, by digest; None: cannot be decoded
        self._features = torch.empty(0, model.config.feature_width)
        super().__init__(model, processor.tokenizer, template, **options)
        self._tokens = _ImagePromptTokens(self)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        projector: str | Path | None = None,
        image_encoder: str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> VisualPrefixScorer:
        """
        Loads a language model and the projector that was trained for it.

        Args:
            path, gguf_file, revision, dtype, device, cache_dir:
                The language model, as in [`CausalLMScorer.from_pretrained`].
            projector (`str` or `Path`, *optional*):
                Folder or Hub id of a [`VisualPrefixProjector`]; by default the packaged one, for
                SmolLM2-135M-Instruct.
            image_encoder (`str`, *optional*):
                Encoder of [`encode_images`] that the projector was trained with; by default the packaged one.
            **options:
                Further arguments of [`CausalLMScorer`].
        """
        language_model, tokenizer, revision = load_language_model(path, gguf_file, revision, dtype, device, cache_dir)
        projector = PACKAGED_PROJECTOR if projector is None else projector
        network = VisualPrefixProjector.from_pretrained(projector).to(language_model.device)
        model = VisualPrefixForConditionalGeneration.from_parts(language_model, network)
        processor = VisualPrefixProcessor(
            tokenizer, language_model.config.vocab_size, network.config.num_image_tokens, image_encoder
        )
        return cls(model, processor, revision=revision, **options)

    def describe(self) -> dict[str, Any]:
        """What a manifest must hold to repeat the scores; the projector by a digest of its weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.projector.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        about = super().describe()
        name = str(getattr(self.model.language_model.config, "_name_or_path", ""))
        return {
            **about,
            "backend": "visual_prefix",
            "model": Path(name).name or type(self.model.language_model).__name__,
            "image_encoder": self.processor.image_encoder or "efficientnet-lite0",
            "projector_sha256": digest.hexdigest(),
        }

    def _jobs(self, prompts: Sequence[Prompt], new_tokens: int | None = None) -> list[Any]:
        self._see(prompts)
        jobs = super()._jobs(prompts, new_tokens)
        for i, prompt in enumerate(prompts):
            shown = (prompt.query, *prompt.demonstrations)
            broken = [row.id for row in shown if row.image is not None and self.number_of(row.image) is None]
            if broken:
                logger.warning("query %s was not asked: the images of %s cannot be read", prompt.query.id, broken)
                jobs[i] = None
        return jobs

    def number_of(self, image: Path | bytes) -> int | None:
        """Which of the encoded images it is; `None` if it cannot be read."""
        content = self._contents[image]
        return None if content is None else self._numbers[content]

    def _see(self, prompts: Sequence[Prompt]) -> None:
        """Encodes the images that are new."""
        rows = {id(row): row for prompt in prompts for row in (prompt.query, *prompt.demonstrations)}.values()
        new: dict[str, Path | bytes] = {}
        for image in {row.image: None for row in rows if row.image is not None and row.image not in self._contents}:
            try:
                content = hashlib.sha256(image if isinstance(image, bytes) else image.read_bytes()).hexdigest()
            except OSError as error:
                logger.warning("%s", error)
                self._contents[image] = None
                continue
            self._contents[image] = content
            if content not in self._numbers:
                new[content] = image
        for content, features in zip(new, self._encoded(list(new.values())), strict=True):
            self._numbers[content] = None if features is None else len(self._features)
            if features is not None:
                self._features = torch.cat([self._features, features[None]])

    def _encoded(self, images: list[Path | bytes]) -> list[Tensor | None]:
        """Features of each image; `None` where it cannot be decoded."""
        if not images:
            return []
        try:
            return list(self.processor.image_features(images))
        except BeamDataError as error:
            if len(images) == 1:
                logger.warning("%s", error)
                return [None]
            return [features for image in images for features in self._encoded([image])]

    def _model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The images of a batch are numbered anew, so that only they are projected."""
        ids, vocab, each = inputs["input_ids"], self.processor.vocab_size, self.processor.num_image_tokens
        soft = ids >= vocab
        if not soft.any():
            return inputs
        numbers, local = torch.unique((ids[soft] - vocab) // each, return_inverse=True)
        renumbered = ids.masked_scatter(soft, vocab + local * each + (ids[soft] - vocab) % each)
        return {**inputs, "input_ids": renumbered, "image_features": self._features[numbers]}


class _ImagePromptTokens(PromptTokens):
    """Prompts with the tokens of images."""

    def __init__(self, scorer: VisualPrefixScorer):
        super().__init__(scorer.tokenizer, scorer.template)
        self.scorer = scorer

    def of_image(self, example: Example) -> tuple[int, ...]:
        number = None if example.image is None else self.scorer.number_of(example.image)
        return () if number is None else tuple(self.scorer.processor.image_tokens(number))
