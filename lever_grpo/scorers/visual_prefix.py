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
        self._numbers: dict[Path | bytes, int | None] = {}  # of images; None: cannot be read
        # by number, which is made of the content: how prompts are packed must not depend on what was seen before
        self._features: dict[int, Tensor | None] = {}  # None: cannot be decoded
        wanted = (model.config.text_config.vocab_size, model.config.num_image_tokens)
        if (processor.vocab_size, processor.num_image_tokens) != wanted:
            raise ValueError(
                f"the processor has vocab_size={processor.vocab_size} and num_image_tokens="
                f"{processor.num_image_tokens}, the model needs {wanted[0]} and {wanted[1]}; make it with these."
            )
        super().__init__(model, processor.tokenizer, template, **options)
        self._tokens = _ImagePromptTokens(self)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        projector: str | Path | None = None,
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
            **options:
                Further arguments of [`CausalLMScorer`].
        """
        language_model, tokenizer, revision = load_language_model(path, gguf_file, revision, dtype, device, cache_dir)
        if projector is None and not PACKAGED_PROJECTOR.is_dir():
            raise FileNotFoundError(
                f"{PACKAGED_PROJECTOR}: there is no packaged projector; train one with recipes/train_visual_prefix.py "
                "and name it by projector."
            )
        projector = PACKAGED_PROJECTOR if projector is None else projector
        # half as large on disk; a projector is small, and the language model's dtype is applied to what it gives
        network: Any = VisualPrefixProjector.from_pretrained(projector, dtype=torch.float32)
        network = network.to(language_model.device)
        model = VisualPrefixForConditionalGeneration.from_parts(language_model, network)
        processor = VisualPrefixProcessor(
            tokenizer,
            language_model.config.vocab_size,
            network.config.num_image_tokens,
            network.config.image_encoder,
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
                self._not_asked(prompt, f"the images of {broken} cannot be read")
                jobs[i] = None
        return jobs

    def number_of(self, image: Path | bytes) -> int | None:
        """The number of an image that was seen; `None` if it cannot be read."""
        number = self._numbers[image]
        return None if number is None or self._features[number] is None else number

    def _see(self, prompts: Sequence[Prompt]) -> None:
        """Encodes the images that are new."""
        rows = {id(row): row for prompt in prompts for row in (prompt.query, *prompt.demonstrations)}.values()
        new: dict[int, Path | bytes] = {}
        for image in {row.image: None for row in rows if row.image is not None and row.image not in self._numbers}:
            try:
                content = image if isinstance(image, bytes) else image.read_bytes()
            except OSError as error:
                logger.warning("%s", error)
                self._numbers[image] = None
                continue
            # 6 bytes: with the soft tokens after the vocabulary, ids stay within 64 bits
            number = int.from_bytes(hashlib.sha256(content).digest()[:6], "big")
            self._numbers[image] = number
            if number not in self._features:
                new[number] = image
        self._features.update(zip(new, self._encoded(list(new.values())), strict=True))

    def _encoded(self, images: list[Path | bytes]) -> list[Tensor | None]:
        """Features of each image; `None` where it cannot be decoded."""
        if not images:
            return []
        try:
            features = self.processor.image_features(images, self.model.device)
        except BeamDataError as error:
            if len(images) == 1:
                logger.warning("%s", error)
                return [None]
            half = len(images) // 2
            return self._encoded(images[:half]) + self._encoded(images[half:])
        if features.shape[1] != self.model.config.feature_width:
            raise ValueError(
                f"the image encoder {self.processor.image_encoder or 'efficientnet-lite0'} gives features "
                f"{features.shape[1]} wide, and the projector reads {self.model.config.feature_width}; name the "
                "encoder that it was trained with."
            )
        return list(features)

    def _model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The images of a batch are numbered anew, from 0."""
        ids, vocab, each = inputs["input_ids"], self.processor.vocab_size, self.processor.num_image_tokens
        soft = ids >= vocab
        if not soft.any():
            return inputs
        numbers, local = torch.unique((ids[soft] - vocab) // each, return_inverse=True)
        renumbered = ids.masked_scatter(soft, vocab + local * each + (ids[soft] - vocab) % each)
        shown = [features for number in numbers.tolist() if (features := self._features[number]) is not None]
        return {**inputs, "input_ids": renumbered, "image_features": torch.stack(shown)}


class _ImagePromptTokens(PromptTokens):
    """Prompts with the tokens of images."""

    def __init__(self, scorer: VisualPrefixScorer):
        super().__init__(scorer.tokenizer, scorer.template)
        self.scorer = scorer

    def of_image(self, example: Example) -> tuple[int, ...]:
        number = None if example.image is None else self.scorer.number_of(example.image)
        return () if number is None else tuple(self.scorer.processor.image_tokens(number))
