"""Scores and answers of a vision-language model, asked through its processor's chat template."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from ..data.examples import Example
from ..data.images import open_image
from .greedy import generate_greedily, pad_token
from .prompts import PromptTemplate
from .protocol import Prompt, ScorerError


logger = logging.getLogger(__name__)
WINDOW = 64  # prompts whose pixels are held at a time; batches of about one length are made among them
TURNS = PromptTemplate(question="{question}", answer="{answer}", stop="", separator="")


@dataclass(frozen=True)
class _Job:
    """One prompt as the model reads it, batch size 1; the answer's last token is not among the inputs."""

    prompt: Prompt
    inputs: dict[str, Tensor]
    answer: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def first(self) -> int:
        """Where the output about the answer's first token stands."""
        return self.length - max(1, len(self.answer))

    @property
    def kind(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Names and sizes of what is not a sequence of tokens: only prompts that agree in them fit into one batch."""
        ids = self.inputs["input_ids"]
        return tuple((name, tuple(x.shape[1:])) for name, x in self.inputs.items() if x.shape != ids.shape)


class VisionLanguageScorer:
    """
    A vision-language model as a [`Scorer`], Qwen2.5-VL first; any whose processor has a chat template.

    Each demonstration is a user turn (its image, if it has one, then its question) and an assistant turn (its first
    answer); the query is the last user turn. Scored are the tokens of the query's first answer **right after the
    generation prompt**, tokenised on their own, so they are the same behind every prompt.

    Args:
        model (`PreTrainedModel`):
            With an image-text-to-text head. It is put in evaluation mode.
        processor (`ProcessorMixin`):
            The model's own, with a chat template.
        template ([`PromptTemplate`], *optional*):
            `question` is the text of a user turn, `answer` that of an assistant turn, `instruction` (if not empty) a
            system turn in front. Turns are told apart by the chat template, so `separator` is not used, and `stop`
            only ends what `answer` gives and, with `score_stop`, is scored after the answer (`"<|im_end|>"`, say).
            Defaults to the bare question and the bare answer.
        token_budget (`int`, *optional*, defaults to `4096`):
            Tokens of a batch, those of images included. Larger needs more memory.
        max_length (`int`, *optional*):
            Longest prompt with its answer, in tokens; the model's own limit if that is lower. Longer ones are not
            asked.
        revision (`str`, *optional*):
            Which version of the weights it is, for `describe`.

    Raises:
        ValueError: if the processor has no chat template, or a number of tokens is not positive.

    Example:

    ```python
    >>> from pathlib import Path
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.scorers import Prompt
    >>> from lever_grpo.scorers.vision_language import VisionLanguageScorer
    >>> scorer = VisionLanguageScorer.from_pretrained("Qwen/Qwen2.5-VL-3B-Instruct")  # doctest: +SKIP
    >>> cat = Example(0, "What animal is this?", ("cat",), image=Path("cat.jpg"))
    >>> dog = Example(1, "What animal is this?", ("dog",), image=Path("dog.jpg"))
    >>> scorer.score([Prompt(dog), Prompt(dog, (cat,))])  # doctest: +SKIP
    [array([-1.2]), array([-0.1])]

    ```
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        template: PromptTemplate = TURNS,
        *,
        token_budget: int = 4096,
        max_length: int | None = None,
        revision: str | None = None,
    ):
        for name, value in (("token_budget", token_budget), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it is a number of tokens, at least 1.")
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{type(processor).__name__} has no chat template, by which demonstrations become turns; "
                "set processor.chat_template to the model's."
            )
        self.model: Any = model.eval()
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.template, self.token_budget, self.revision = template, token_budget, revision
        limits = (max_length, getattr(model.config.get_text_config(), "max_position_embeddings", None))
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self.problems: dict[Prompt, str] = {}  # why prompts of the last call were not asked
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._open = lru_cache(maxsize=WINDOW)(open_image)  # demonstrations come again and again

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **options: Any,
    ) -> VisionLanguageScorer:
        """
        Loads a model and its processor. Code that comes with a model is never run.

        Args:
            path (`str` or `Path`):
                A local folder, or the model's id on the Hub.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Of the weights; `"auto"` is what the files hold.
            device (`str` or `torch.device`, *optional*):
                Defaults to the GPU, if there is one.
            min_pixels, max_pixels (`int`, *optional*):
                Images are scaled to between so many pixels, where the image processor has these settings (Qwen's
                have). Fewer pixels are fewer tokens.
            **options:
                Further arguments of [`VisionLanguageScorer`].

        Raises:
            ImportError: if what the processor needs (Pillow, mostly torchvision too) is not installed.
            ValueError: if `min_pixels` or `max_pixels` is given to an image processor that does not know it.

        Example:

        ```python
        >>> from lever_grpo.scorers.vision_language import VisionLanguageScorer
        >>> scorer = VisionLanguageScorer.from_pretrained(
        ...     "Qwen/Qwen2.5-VL-3B-Instruct", dtype="bfloat16", max_pixels=512 * 28 * 28
        ... )  # doctest: +SKIP

        ```
        """
        try:
            processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=False)
        except ImportError as error:
            raise ImportError(
                f"{error}\nPackages for images are installed by pip install 'lever_grpo[vision]'"
            ) from error
        given = {"min_pixels": min_pixels, "max_pixels": max_pixels}
        pixels = {name: value for name, value in given.items() if value is not None}
        if pixels:
            known = inspect.get_annotations(processor.image_processor.valid_kwargs)
            if unknown := sorted(pixels.keys() - known.keys()):
                raise ValueError(
                    f"{type(processor.image_processor).__name__} has no setting {', '.join(unknown)}; leave it out, "
                    "or set processor.image_processor.size yourself."
                )
            # given to AutoProcessor, they would also become settings of the tokenizer
            processor.image_processor = AutoImageProcessor.from_pretrained(
                path, revision=revision, trust_remote_code=False, **pixels
            )
        model: Any = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype, trust_remote_code=False
        )
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        revision = revision or getattr(model.config, "_commit_hash", None)
        return cls(model.to(device), processor, revision=revision, **options)

    def score(self, prompts: Sequence[Prompt]) -> list[NDArray[np.float64] | None]:
        """
        Log-probabilities of the tokens of each query's first answer, (T,) each, in nats.

        Equal prompts are computed once. `None`, and a warning that names the query, for a prompt that is too long, has
        a broken image (its own row is named too), or that the processor refuses.

        Raises:
            `ScorerError`: if the model fails (out of memory, say); the message names the queries of the batch.
        """
        return self._results(prompts, self._log_probs)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int = 10) -> list[str | None]:
        """
        The model's own answers, by greedy decoding up to its end of turn (and the template's `stop`), stripped; `None`
        as in `score`.

        Raises:
            `ScorerError`: if the model fails; the message names the queries of the batch.
        """
        return self._results(prompts, lambda jobs: self._generate(jobs, max_new_tokens), max_new_tokens)

    def describe(self) -> dict[str, Any]:
        """What a manifest must hold to repeat the scores."""
        name = str(getattr(self.model.config, "_name_or_path", ""))
        images = self.processor.image_processor
        return {
            "backend": "vision_language",
            "model": Path(name).name or type(self.model).__name__,  # the last part: paths differ between machines
            "revision": self.revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "template": asdict(self.template),
            "chat_template_sha256": hashlib.sha256(str(self.processor.chat_template).encode()).hexdigest(),
            "image_processor": type(images).__name__,
            "image_size": {key: size for key, size in dict(images.size or {}).items() if size is not None},
            "max_length": self.max_length,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        }

    @torch.no_grad()
    def _results(
        self, prompts: Sequence[Prompt], ask: Callable[[list[_Job]], list[Any]], new_tokens: int | None = None
    ) -> list[Any]:
        """What `ask` says of each prompt, in batches of about one length; `None` where it could not be asked."""
        self.problems = {}
        different = list(dict.fromkeys(prompts))
        results: dict[Prompt, Any] = {}
        for start in range(0, len(different), WINDOW):
            jobs = (self._job(prompt, new_tokens) for prompt in different[start : start + WINDOW])
            for batch in _batches((job for job in jobs if job is not None), self.token_budget, new_tokens or 0):
                try:
                    found = ask(batch)
                except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
                    names = ", ".join(map(str, sorted({job.prompt.query.id for job in batch})))
                    raise ScorerError(f"the model failed on a batch with the queries {names}: {error}") from error
                results.update(zip((job.prompt for job in batch), found, strict=True))
        found_all = [results.get(prompt) for prompt in prompts]
        return [x.copy() if isinstance(x, np.ndarray) else x for x in found_all]

    def _job(self, prompt: Prompt, new_tokens: int | None) -> _Job | None:
        """The prompt with its answer or, with `new_tokens`, with room for one; `None` if it cannot be asked."""
        messages = []
        if self.template.instruction:
            messages.append(_turn("system", self.template.instruction))
        examples = (*prompt.demonstrations, prompt.query)
        for place, example in enumerate(examples, start=1):
            is_query = place == len(examples)
            image = None
            if example.image is not None:
                try:
                    image = self._open(example.image)
                except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
                    whose = "its image" if is_query else f"the image of demonstration {example.id}"
                    self._not_asked(prompt, f"{whose} cannot be read: {_reason(error)}")
                    return None
            messages.append(_turn("user", self.template.of_query(example), image))
            if not is_query:
                messages.append(_turn("assistant", self._answer_text(example)))
        try:
            encoded = self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except ValueError as error:
            self._not_asked(prompt, f"the processor refuses its prompt: {error}")
            return None
        inputs = dict(encoded)
        answer: tuple[int, ...] = ()
        if new_tokens is None:
            answer = tuple(self.tokenizer(self.template.of_answer(prompt.query), add_special_tokens=False).input_ids)
        length = inputs["input_ids"].shape[1] + (len(answer) if new_tokens is None else new_tokens)
        problem = None
        if self.max_length is not None and length > self.max_length:
            problem = f"{length} tokens with the answer, more than max_length={self.max_length}"
        elif new_tokens is None and not answer:
            problem = f"the answer {prompt.query.answers[0]!r} has no tokens"
        if problem:
            self._not_asked(prompt, problem)
            return None
        shape = inputs["input_ids"].shape
        rest = {"input_ids": torch.tensor([answer[:-1]], dtype=torch.long)}
        rest["attention_mask"] = torch.ones_like(rest["input_ids"])
        for name, x in inputs.items():
            if x.shape == shape:  # others, like token types, are 0 for text
                inputs[name] = torch.cat([x, rest.get(name, torch.zeros_like(rest["input_ids"])).to(x.dtype)], dim=1)
        return _Job(prompt, inputs, answer)

    def _not_asked(self, prompt: Prompt, problem: str) -> None:
        logger.warning("query %s was not asked: %s", prompt.query.id, problem)
        self.problems[prompt] = problem

    def _answer_text(self, example: Example) -> str:
        """An assistant turn of a demonstration; the chat template ends it."""
        return self.template.answer.replace("{answer}", example.answers[0])

    def _log_probs(self, jobs: list[_Job]) -> list[NDArray[np.float64]]:
        inputs = self._collate(jobs, "right")  # no token's position depends on the padding
        keep = sorted({job.first + i for job in jobs for i in range(len(job.answer))})
        places = torch.tensor(keep, device=self.model.device)
        if self._keeps:
            logits = self.model(**inputs, use_cache=False, logits_to_keep=places).logits  # (B, K, V)
        else:
            logits = self.model(**inputs, use_cache=False).logits[:, places]
        found = []
        for row, job in zip(logits, jobs, strict=True):
            start = keep.index(job.first)
            log_probs = row[start : start + len(job.answer)].float().log_softmax(-1)  # (T, V)
            targets = torch.tensor(job.answer, device=log_probs.device)[:, None]
            found.append(log_probs.gather(1, targets)[:, 0].double().cpu().numpy())
        return found

    def _generate(self, jobs: list[_Job], max_new_tokens: int) -> list[str]:
        inputs = self._collate(jobs, "left")
        generated = generate_greedily(self.model, self.tokenizer, inputs, max_new_tokens)
        texts = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        stop = self.template.stop
        return [(text.split(stop)[0] if stop else text).strip() for text in texts]

    def _collate(self, jobs: list[_Job], side: str) -> dict[str, Tensor]:
        """Token sequences padded on one side, (B, L); everything else (pixels, sizes of images) one after another."""
        width = max(job.length for job in jobs)
        batch = {}
        for name, first in jobs[0].inputs.items():
            rows = [job.inputs[name] for job in jobs]
            if first.shape == jobs[0].inputs["input_ids"].shape:
                value = pad_token(self.tokenizer) if name == "input_ids" else 0
                free = [width - row.shape[1] for row in rows]
                rows = [
                    torch.nn.functional.pad(row, (n, 0) if side == "left" else (0, n), value=value)
                    for row, n in zip(rows, free, strict=True)
                ]
            x = torch.cat(rows).to(self.model.device)
            batch[name] = x.to(self.model.dtype) if x.is_floating_point() else x
        return batch


def _reason(error: Exception) -> str:
    """Pillow's message, without the address in memory of bytes that it could not read."""
    return f"{type(error).__name__}: {str(error).split(' <_io.')[0]}"


def _turn(role: str, text: str, image: Any = None) -> dict[str, Any]:
    """A message of a chat template: the image first, as the processors' documentation has it."""
    parts = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _batches(jobs: Iterable[_Job], budget: int, new_tokens: int) -> Iterator[list[_Job]]:
    """Batches of one kind and of about one length that take at most `budget` tokens when padded."""
    ordered = sorted(jobs, key=lambda job: (job.kind, -job.length))
    while ordered:
        longest, count = ordered[0], max(1, budget // (ordered[0].length + new_tokens))
        batch = [job for job in ordered[:count] if job.kind == longest.kind]
        yield batch
        ordered = ordered[len(batch) :]
