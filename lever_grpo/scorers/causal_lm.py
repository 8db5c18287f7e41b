"""Scores and answers of a causal language model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, StoppingCriteria
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .greedy import generate_greedily, pad_token
from .loading import load_language_model
from .packing import ROW_LENGTH, Job, Row, batches_by_length, pad_rows, single_row, tree_rows
from .prompts import PromptTemplate
from .protocol import Prompt, ScorerError
from .tokens import PromptTokens


logger = logging.getLogger(__name__)
KEPT_CHOICES = 200_000  # prompts of a closed set whose most probable answer `score` remembers for `answer`


class CausalLMScorer:
    """
    A causal language model as a [`Scorer`].

    A prompt's tokens are **the concatenation of its pieces' tokens** (beginning-of-sequence token where the tokenizer
    adds one, instruction, each demonstration, query, answer): every piece is tokenised once, and a demonstration
    means the same to the model wherever it stands. The instruction and the demonstrations are tokenised as they are
    in front of a question, since many tokenizers split a line break by what comes after it. So the tokens are those
    of the whole text, unless a tokenizer merges text across pieces.

    Args:
        model (`PreTrainedModel`):
            With a language-model head. It is put in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`):
            The model's own.
        template ([`PromptTemplate`], *optional*):
            How questions and answers become text.
        answers (`Sequence[str]`, *optional*):
            The closed set of answers, where a task has one. A prompt's score is then one number: the log-probability
            of the answer **among the set, by its first token**, so all first tokens must differ. Only these tokens'
            logits are computed. `answer` gives the most probable of the set.
        token_budget (`int`, *optional*, defaults to `4096`):
            Tokens of a batch. Larger needs more memory.
        max_length (`int`, *optional*):
            Longest prompt with its answer, in tokens; the model's own limit if that is lower. Longer ones are not
            asked.
        revision (`str`, *optional*):
            Which version of the weights it is, for `describe`.
        share_prefixes (`bool`, *optional*, defaults to `True`):
            Whether beginnings that prompts share are computed once, where the model can be asked so. Scores are the
            same up to rounding.

    Raises:
        ValueError: if the model has no head, the budget is not positive, or two answers begin with the same token.

    Example:

    ```python
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.scorers import Prompt
    >>> from lever_grpo.scorers.causal_lm import CausalLMScorer
    >>> scorer = CausalLMScorer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
    >>> france, peru = Example(0, "Capital of France?", ("Paris",)), Example(1, "Capital of Peru?", ("Lima",))
    >>> scorer.score([Prompt(peru), Prompt(peru, (france,))])  # doctest: +SKIP
    [array([-5.1]), array([-0.2])]

    ```
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: PromptTemplate | None = None,
        *,
        answers: Sequence[str] | None = None,
        token_budget: int = 4096,
        max_length: int | None = None,
        revision: str | None = None,
        share_prefixes: bool = True,
    ):
        for name, value in (("token_budget", token_budget), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: it is a number of tokens, at least 1.")
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} has no language-model head; load it by AutoModelForCausalLM.")
        self.model: Any = model.eval()
        self.tokenizer: Any = tokenizer
        self.template = template if template is not None else PromptTemplate()
        self.token_budget, self.revision = token_budget, revision
        config = model.config.get_text_config()
        limits = (max_length, getattr(config, "max_position_embeddings", None))
        self.max_length = min((limit for limit in limits if limit is not None), default=None)
        self._window = getattr(config, "sliding_window", None)  # layers that see no further need their own masks
        self._tokens = PromptTokens(tokenizer, self.template)
        self.answers = None if answers is None else tuple(answers)
        self._answer_tokens = None if self.answers is None else self._first_tokens(self.answers)
        self.problems: dict[Prompt, str] = {}  # why prompts of the last call were not asked
        self._chosen: dict[tuple[int, ...], int] = {}  # the most probable of `answers`, of prompts that were scored
        self.share_prefixes = share_prefixes and self._can_share()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        gguf_file: str | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> CausalLMScorer:
        """
        Loads a model and its tokenizer. Code that comes with a model is never run.

        Args:
            path (`str` or `Path`):
                A local folder, or the model's id on the Hub.
            gguf_file (`str`, *optional*):
                Name of a GGUF file in it; needs the packages `gguf` and `accelerate`.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub.
            dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
                Of the weights; `"auto"` is what the files hold (GGUF: float32). `"bfloat16"` is several times as
                fast where the processor has instructions for it.
            device (`str` or `torch.device`, *optional*):
                Defaults to the GPU, if there is one.
            cache_dir (`str` or `Path`, *optional*):
                Where the unpacked weights of a GGUF file are kept as safetensors, so that it loads in a second the
                next time.
            **options:
                Further arguments of [`CausalLMScorer`].

        Example:

        ```python
        >>> from lever_grpo.scorers.causal_lm import CausalLMScorer
        >>> scorer = CausalLMScorer.from_pretrained(
        ...     "folder", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype="bfloat16", cache_dir="unpacked"
        ... )  # doctest: +SKIP

        ```
        """
        model, tokenizer, revision = load_language_model(path, gguf_file, revision, dtype, device, cache_dir)
        return cls(model, tokenizer, revision=revision, **options)

    @torch.no_grad()
    def score(self, prompts: Sequence[Prompt]) -> list[NDArray[np.float64] | None]:
        """
        Log-probabilities of the tokens of each query's first answer, (T,) each, in nats; (1,) with `answers`.

        Equal prompts are computed once. `None`, and a warning that names the query, for a prompt that is too long, has
        no tokens before or in its answer, or whose answer is not one of `answers`.

        Raises:
            `ScorerError`: if the model fails (out of memory, say); the message names the queries of the batch.
        """
        jobs = self._jobs(prompts)
        if len(self._chosen) > KEPT_CHOICES:  # nobody asks for answers
            self._chosen.clear()
        results: dict[Job, NDArray[np.float64]] = {}
        for batch, logits in self._logits(_queries(jobs, prompts)):
            columns = [self._column(token) for job in batch for token in job.answer]
            targets = torch.tensor(columns, device=logits.device)[:, None]  # (P, 1)
            log_probs = logits.gather(1, targets)[:, 0] - logits.logsumexp(1)  # (P,)
            if self.answers is not None:  # `answer` is often asked about the same prompts next
                self._chosen.update(zip((job.prompt for job in batch), logits.argmax(1).tolist(), strict=True))
            ends = np.cumsum([len(job.answer) for job in batch])
            results.update(zip(batch, np.split(log_probs.double().cpu().numpy(), ends[:-1]), strict=True))
        return [None if job is None else results[job].copy() for job in jobs]

    @torch.no_grad()
    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int = 10) -> list[str | None]:
        """
        The model's own answers, by greedy decoding up to the template's `stop`, stripped; with `answers`, the most
        probable of them. `None` as in `score`.

        Raises:
            `ScorerError`: if the model fails; the message names the queries of the batch.
        """
        jobs = self._jobs(prompts, new_tokens=max_new_tokens if self.answers is None else 1)
        queries = _queries(jobs, prompts)
        texts: dict[Job, str] = {}
        if self.answers is not None:
            chosen = {job: self._chosen[job.prompt] for job in queries if job.prompt in self._chosen}
            for batch, logits in self._logits({job: query for job, query in queries.items() if job not in chosen}):
                chosen.update(zip(batch, logits.argmax(1).tolist(), strict=True))
            texts = {job: self.answers[i] for job, i in chosen.items()}
            self._chosen.clear()  # else how the rest is packed would depend on what was asked long before
        else:
            for batch in batches_by_length(queries, lambda job: len(job.prompt) + max_new_tokens, self.token_budget):
                with _naming(queries[job] for job in batch):
                    texts.update(
                        zip(batch, self._generate([job.prompt for job in batch], max_new_tokens), strict=True)
                    )
        return [None if job is None else texts[job] for job in jobs]

    def describe(self) -> dict[str, Any]:
        """What a manifest must hold to repeat the scores."""
        name = str(getattr(self.model.config, "_name_or_path", ""))
        return {
            "backend": "causal_lm",
            "model": Path(name).name or type(self.model).__name__,  # the last part: paths differ between machines
            "revision": self.revision,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "template": asdict(self.template),
            "answers": None if self.answers is None else list(self.answers),
            "max_length": self.max_length,
            "transformers": transformers.__version__,
            "torch": str(torch.__version__),
        }

    def _first_tokens(self, answers: Sequence[str]) -> list[int]:
        """The tokens that tell the answers of a closed set apart."""
        texts = [self.template.answer.replace("{answer}", answer) for answer in answers]
        first: dict[int, str] = {}
        for answer, tokens in zip(answers, self._tokens.of_texts(texts), strict=True):
            if not tokens:
                raise ValueError(f"answers: {answer!r} has no tokens; every answer must have one.")
            token = tokens[0]
            if token in first:
                raise ValueError(
                    f"answers: {first[token]!r} and {answer!r} begin with the same token, but those of a closed set "
                    "are told apart by their first; rename one, or score without `answers`."
                )
            first[token] = answer
        if not first:
            raise ValueError("answers is empty: a closed set needs answers; leave it out for open ones.")
        return list(first)

    def _column(self, token: int) -> int:
        """Where the token is in the logits."""
        return token if self._answer_tokens is None else self._answer_tokens.index(token)

    def _jobs(self, prompts: Sequence[Prompt], new_tokens: int | None = None) -> list[Job | None]:
        """What to ask: about each query's answer or, with `new_tokens`, for one. `None` where that cannot be asked."""
        self.problems = {}
        starts, endings = self._tokens.of_prompts(prompts), self._tokens.of_answers(prompts)
        jobs: list[Job | None] = []
        for prompt, start, ending in zip(prompts, starts, endings, strict=True):
            answer = ending if new_tokens is None else ()
            length, words = len(start) + (new_tokens or len(answer)), prompt.query.answers[0]
            problem = None
            if self.max_length is not None and length > self.max_length:
                problem = f"{length} tokens with the answer, more than max_length={self.max_length}"
            elif not start:
                problem = "the prompt has no tokens, so nothing comes before the answer"
            elif new_tokens is None and not answer:
                problem = f"the answer {words!r} has no tokens"
            elif new_tokens is None and self.answers is not None and words not in self.answers:
                problem = f"the answer {words!r} is not one of {list(self.answers)}"
            if problem:
                self._not_asked(prompt, problem)
            jobs.append(None if problem else Job(start, answer if self.answers is None else answer[:1]))
        return jobs

    def _not_asked(self, prompt: Prompt, problem: str) -> None:
        logger.warning("query %s was not asked: %s", prompt.query.id, problem)
        self.problems[prompt] = problem

    def _can_share(self) -> bool:
        """Tries whether the model obeys a mask and positions of trees."""
        if "position_ids" not in inspect.signature(self.model.forward).parameters:
            return False
        a, b = (*range(4), *range(4, 7)), (*range(4), *range(7, 10))
        apart = Job(b, ())
        together = Job(a + b[4:], ())  # what a model reads that ignores the mask
        try:
            right, wrong = self._forward([single_row(apart), single_row(together)], trees=False)
            ours = self._forward(list(tree_rows([Job(a, ()), apart], ROW_LENGTH)), trees=True)[1]
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            logger.info("%s cannot share prefixes (%s): scoring in padded batches", type(self.model).__name__, error)
            return False
        return bool((ours - right).abs().max() < 0.05 * (wrong - right).abs().max())

    def _logits(self, queries: dict[Job, int]) -> Iterator[tuple[list[Job], Tensor]]:
        """Batches of jobs with the logits about their answers' tokens, (P, V): those of a job follow each other."""
        longest = max((len(job.inputs) for job in queries), default=0)
        # a mask of trees does not say how far layers with a sliding window see
        trees = self.share_prefixes and (self._window is None or longest <= self._window)
        rows = tree_rows(queries, ROW_LENGTH) if trees else map(single_row, queries)
        for batch in batches_by_length(rows, len, self.token_budget):
            jobs = [job for row in batch for job, _ in row.jobs]
            with _naming(queries[job] for job in jobs):
                logits = self._forward(batch, trees)
            yield jobs, logits

    @torch.no_grad()
    def _forward(self, batch: list[Row], trees: bool) -> Tensor:
        """Logits where the jobs of the rows ask for them, (P, V), in float32."""
        width = max(map(len, batch))
        inputs = {"input_ids": pad_rows([row.tokens for row in batch], torch.zeros(width, dtype=torch.long))}
        if trees:
            place = torch.arange(width)
            ends = pad_rows([row.ends for row in batch], place + 1)  # (B, L)
            seen = (place[:, None] >= place) & (place[:, None] < ends[:, None])  # (B, L, L)
            mask = torch.zeros(seen.shape, dtype=self.model.dtype)
            inputs["attention_mask"] = mask.masked_fill_(~seen, torch.finfo(mask.dtype).min)[:, None]
            inputs["position_ids"] = pad_rows([row.positions for row in batch], torch.zeros(width, dtype=torch.long))
        # the end of a padded row needs no mask: causal attention never looks at it
        at = [(i, column) for i, row in enumerate(batch) for _, columns in row.jobs for column in columns]
        with _head_at(self.model, torch.tensor(at, device=self.model.device), self._answer_tokens):
            inputs = {name: x.to(self.model.device) for name, x in self._model_inputs(inputs).items()}
            return self.model(**inputs, use_cache=False).logits[0].float()

    def _model_inputs(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the model is called with, made of tokens, positions and mask."""
        return inputs

    def _generate(self, prompts: list[tuple[int, ...]], max_new_tokens: int) -> list[str]:
        stop, tokenizer = self.template.stop, self.tokenizer
        width = max(map(len, prompts))
        pad = pad_token(tokenizer)
        ids = torch.tensor([(pad,) * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        inputs = self._model_inputs({"input_ids": ids, "attention_mask": mask})
        inputs = {name: x.to(self.model.device) for name, x in inputs.items()}
        criteria: list[StoppingCriteria] | None = [_Stop(tokenizer, stop, width)] if stop else None
        generated = generate_greedily(self.model, tokenizer, inputs, max_new_tokens, criteria)
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        return [(text.split(stop)[0] if stop else text).strip() for text in texts]


class _Stop(StoppingCriteria):
    """Ends the rows whose new text holds `stop`."""

    def __init__(self, tokenizer: Any, stop: str, width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :])
        return torch.tensor([self.stop in text for text in texts], device=input_ids.device)


def _queries(jobs: Sequence[Job | None], prompts: Sequence[Prompt]) -> dict[Job, int]:
    """The different jobs, each with a query that asks it."""
    return {job: prompt.query.id for job, prompt in zip(jobs, prompts, strict=True) if job is not None}


@contextmanager
def _head_at(model: Any, at: Tensor, tokens: list[int] | None) -> Iterator[None]:
    """
    The model's logits become those at the (row, column) pairs `at`, (1, P, V), and of some tokens only, if given.

    What a model does to its logits after the head (scaling, capping) stays in place.
    """
    head = model.get_output_embeddings()
    narrow = head
    if tokens is not None:
        narrow = nn.Linear(head.in_features, len(tokens), bias=head.bias is not None, device="meta")
        narrow.weight = nn.Parameter(head.weight[tokens], requires_grad=False)
        if head.bias is not None:
            narrow.bias = nn.Parameter(head.bias[tokens], requires_grad=False)
        model.set_output_embeddings(narrow)
    hook = narrow.register_forward_pre_hook(lambda _, hidden: (hidden[0][at[:, 0], at[:, 1]][None],))
    try:
        yield
    finally:
        hook.remove()
        if narrow is not head:
            model.set_output_embeddings(head)


@contextmanager
def _naming(queries: Iterable[int]) -> Iterator[None]:
    """Says which queries a model failed on."""
    try:
        yield
    except RuntimeError as error:  # out of memory is one
        names = ", ".join(map(str, sorted(set(queries))))
        raise ScorerError(f"the model failed on a batch with the queries {names}: {error}") from error
