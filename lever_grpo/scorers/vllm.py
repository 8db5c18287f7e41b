"""Scores and answers of a vLLM server, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from transformers import AutoTokenizer

from .prompts import PromptTemplate
from .protocol import Prompt, ScorerError
from .tokens import PromptTokens


logger = logging.getLogger(__name__)
LONGEST_WAIT = 60.0  # seconds between two tries
MINUS_INFINITY = -9999.0  # how vLLM writes it: JSON has no infinity
_OF_THE_PROMPT = (400, 413, 422)  # refusals that may be one prompt's fault; other 4xx concern every request
_PASSING = (408, 425, 429)


@dataclass(frozen=True)
class _Job:
    """What is asked: `tokens`, the last `answer` of them being the answer's."""

    query: int
    tokens: tuple[int, ...]
    answer: int = 0


class _Refused(Exception):
    """The server would not take a request because of what is in it."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it could carry prompts and the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


class VLLMScorer:
    """
    A vLLM server as a [`Scorer`]: its OpenAI-compatible `/v1/completions`, with `prompt_logprobs`.

    Prompts are sent as token ids, built as [`CausalLMScorer`] builds them: the concatenation of its pieces' tokens.
    The scores of one model are the same from both, up to rounding.

    Args:
        url (`str`):
            Of the server, with or without the `/v1` at its end: `"http://localhost:8000"`.
        model (`str`):
            The name under which the server serves the model.
        tokenizer (`PreTrainedTokenizerBase`):
            The served model's own.
        template ([`PromptTemplate`], *optional*):
            How questions and answers become text.
        api_key (`str`, *optional*):
            Sent in the Authorization header and nowhere else. Defaults to the environment variable `VLLM_API_KEY`.
        batch_size (`int`, *optional*, defaults to `32`):
            Prompts of a request.
        concurrency (`int`, *optional*, defaults to `8`):
            Requests under way at a time.
        max_length (`int`, *optional*):
            Longest prompt with its answer, in tokens. Longer ones are not sent; without it the server refuses what is
            too long for it, at the cost of a few more requests.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds without a byte of the reply after which a request counts as failed.
        retries (`int`, *optional*, defaults to `5`):
            Further tries of a request that failed by a broken connection, a timeout, a busy server (429), an error of
            the server (5xx) or a reply that is not JSON.
        backoff (`float`, *optional*, defaults to `0.5`):
            Seconds before the second try, doubled for each further one, a minute at most.

    Raises:
        ValueError: if the URL is not http(s), holds a password, or a number is out of its range.

    Example:

    ```python
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.scorers import Prompt
    >>> from lever_grpo.scorers.vllm import VLLMScorer
    >>> scorer = VLLMScorer.from_pretrained(
    ...     "http://localhost:8000", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ... )  # doctest: +SKIP
    >>> france, peru = Example(0, "Capital of France?", ("Paris",)), Example(1, "Capital of Peru?", ("Lima",))
    >>> scorer.score([Prompt(peru), Prompt(peru, (france,))])  # doctest: +SKIP
    [array([-5.1]), array([-0.2])]

    ```
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        template: PromptTemplate | None = None,
        *,
        api_key: str | None = None,
        batch_size: int = 32,
        concurrency: int = 8,
        max_length: int | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
    ):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} is not an address like 'http://localhost:8000'.")
        if parts.username or parts.password:
            raise ValueError("url holds a user name or a password; give the key as api_key or in VLLM_API_KEY.")
        if parts.query or parts.fragment:
            raise ValueError(f"url={url!r} has more than a path behind the host; leave out what follows ? or #.")
        for name, value in (("batch_size", batch_size), ("concurrency", concurrency), ("max_length", max_length)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if retries < 0 or backoff < 0 or timeout <= 0:
            raise ValueError(
                f"retries={retries} and backoff={backoff} must not be negative, timeout={timeout} must be positive."
            )
        self.url, self.model, self.tokenizer = url.rstrip("/").removesuffix("/v1"), model, tokenizer
        self.template = template if template is not None else PromptTemplate()
        self.batch_size, self.concurrency, self.max_length = batch_size, concurrency, max_length
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self.problems: dict[Prompt, str] = {}  # why prompts of the last call were not asked
        self._key = api_key if api_key is not None else os.environ.get("VLLM_API_KEY")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._tokens = PromptTokens(tokenizer, self.template)

    @classmethod
    def from_pretrained(
        cls,
        url: str,
        model: str,
        tokenizer: str | Path | None = None,
        *,
        revision: str | None = None,
        **options: Any,
    ) -> VLLMScorer:
        """
        Loads the tokenizer of the served model. Code that comes with it is never run.

        Args:
            url (`str`):
                Of the server.
            model (`str`):
                The name under which the server serves the model.
            tokenizer (`str` or `Path`, *optional*):
                A local folder, or an id on the Hub. Defaults to `model`.
            revision (`str`, *optional*):
                Branch, tag or commit of the tokenizer on the Hub.
            **options:
                Further arguments of [`VLLMScorer`].

        Example:

        ```python
        >>> from lever_grpo.scorers.vllm import VLLMScorer
        >>> scorer = VLLMScorer.from_pretrained("http://localhost:8000", "served", "folder")  # doctest: +SKIP

        ```
        """
        read = AutoTokenizer.from_pretrained(tokenizer or model, revision=revision, trust_remote_code=False)
        return cls(url, model, read, **options)

    def score(self, prompts: Sequence[Prompt]) -> list[NDArray[np.float64] | None]:
        """
        Log-probabilities of the tokens of each query's first answer, (T,) each, in nats.

        Equal prompts are sent once. `None`, and a warning that names the query, for a prompt that is too long, has no
        tokens before or in its answer, or that the server refuses. NaN is passed on, also where the server writes it
        as null.

        Raises:
            `ScorerError`: if the server cannot be reached, fails for good, refuses every request (key, model), or its
                reply is not what was asked for; the message names the queries of the request.
        """
        # vLLM takes max_tokens from 1 on; 0 further tokens per position leaves the prompt's own
        settings = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        return self._results(prompts, self._jobs(prompts), settings, _log_probs)

    def answer(self, prompts: Sequence[Prompt], max_new_tokens: int = 10) -> list[str | None]:
        """
        The model's own answers, by greedy decoding up to the template's `stop`, stripped; `None` as in `score`.

        Raises:
            `ScorerError`: as in `score`.
        """
        # a server takes penalties from the checkpoint's own settings unless told otherwise
        settings: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": 0.0, "repetition_penalty": 1.0}
        if self.template.stop:
            settings["stop"] = [self.template.stop]
        return self._results(prompts, self._jobs(prompts, max_new_tokens), settings, _text)

    def describe(self) -> dict[str, Any]:
        """
        What a manifest must hold to repeat the scores. The server is asked for its version, where it tells.

        Raises:
            `ScorerError`: if the server cannot be reached, or says that it does not serve the model.
        """
        models, version = self._ask("/v1/models", "describe"), self._ask("/version", "describe")
        served = models.get("data") if isinstance(models, dict) else None
        cards = [card for card in served if isinstance(card, dict)] if isinstance(served, list) else []
        card = next((card for card in cards if card.get("id") == self.model), {})
        if cards and not card:
            raise ScorerError(
                f"{self.url} does not serve the model {self.model!r}, but {[card.get('id') for card in cards]}; "
                "give one of these names."
            )
        name = Path(self.model)
        return {
            "backend": "vllm",
            "model": name.name if name.is_absolute() else self.model,  # paths differ between machines
            "server_max_length": card.get("max_model_len"),
            "server_version": version.get("version") if isinstance(version, dict) else None,
            "template": asdict(self.template),
            "max_length": self.max_length,
            "transformers": transformers.__version__,
        }

    def _jobs(self, prompts: Sequence[Prompt], new_tokens: int | None = None) -> list[_Job | None]:
        """The prompts with their answers or, with `new_tokens`, with room for one; `None` if it cannot be asked."""
        self.problems = {}
        starts, answers = self._tokens.of_prompts(prompts), self._tokens.of_answers(prompts)
        return [
            self._job(prompt, start, () if new_tokens else answer, new_tokens)
            for prompt, start, answer in zip(prompts, starts, answers, strict=True)
        ]

    def _job(
        self, prompt: Prompt, start: tuple[int, ...], answer: tuple[int, ...], new_tokens: int | None
    ) -> _Job | None:
        length = len(start) + (new_tokens or len(answer))
        problem = None
        if self.max_length is not None and length > self.max_length:
            problem = f"{length} tokens with the answer, more than max_length={self.max_length}"
        elif not start:
            problem = "the prompt has no tokens, so nothing comes before the answer"
        elif new_tokens is None and not answer:
            problem = f"the answer {prompt.query.answers[0]!r} has no tokens"
        if problem:
            self._not_asked(prompt, problem)
        return None if problem else _Job(prompt.query.id, start + answer, len(answer))

    def _not_asked(self, prompt: Prompt, problem: str) -> None:
        logger.warning("query %s was not asked: %s", prompt.query.id, problem)
        self.problems[prompt] = problem

    def _results(
        self,
        prompts: Sequence[Prompt],
        jobs: Sequence[_Job | None],
        settings: dict[str, Any],
        read: Callable[[_Job, Any], Any],
    ) -> list[Any]:
        """What `read` finds in the server's reply about each job; `None` for those that were not taken."""
        different = list(dict.fromkeys(job for job in jobs if job is not None))
        batches = [different[i : i + self.batch_size] for i in range(0, len(different), self.batch_size)]
        results: dict[_Job, Any] = {}
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            for answered in pool.map(lambda batch: self._complete(batch, settings, read), batches):
                results.update(answered)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing more is sent
        found: list[Any] = [None if job is None else results[job] for job in jobs]
        for i, prompt in enumerate(prompts):
            if isinstance(found[i], _Refused):
                self._not_asked(prompt, f"the server refuses its prompt: {found[i]}")
                found[i] = None
        return [x.copy() if isinstance(x, np.ndarray) else x for x in found]

    def _complete(
        self, jobs: Sequence[_Job], settings: dict[str, Any], read: Callable[[_Job, Any], Any]
    ) -> dict[_Job, Any]:
        """One request; if it is refused, its halves, down to the prompts that the server does not take."""
        names = "queries " + ", ".join(map(str, sorted({job.query for job in jobs})))
        body = {"model": self.model, "prompt": [job.tokens for job in jobs], **settings}
        try:
            reply = self._ask("/v1/completions", names, body)
        except _Refused as refusal:
            if len(jobs) == 1:
                return {jobs[0]: refusal}
            half = len(jobs) // 2
            return self._complete(jobs[:half], settings, read) | self._complete(jobs[half:], settings, read)
        try:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(len(jobs))):
                raise ValueError(f"{len(choices)} choices for {len(jobs)} prompts")
            return {job: read(job, choice) for job, choice in zip(jobs, choices, strict=True)}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ScorerError(
                f"{names}: the reply of {self.url} is not what was asked for ({type(error).__name__}: {error}); check "
                "that it is a vLLM server and that the tokenizer is the served model's."
            ) from error

    def _ask(self, path: str, what: str, body: dict[str, Any] | None = None) -> Any:
        """The server's reply as JSON, after some tries; `None` where it has no such page and nothing was sent."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(
            self.url + path, data=None if body is None else json.dumps(body).encode(), headers=headers
        )
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        problem = ""
        for attempt in range(self.retries + 1):
            asked_to_wait = 0.0
            try:
                with self._opener.open(request, timeout=self.timeout) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"{error.code} {error.reason}: {self._message(error)}"
                if error.code in _OF_THE_PROMPT and body is not None:
                    raise _Refused(problem) from error
                if error.code < 500 and error.code not in _PASSING:
                    if body is None and error.code in (404, 405):
                        return None
                    raise ScorerError(
                        f"{what}: {self.url}{path} answers {problem}; check the URL (redirects are not followed), the "
                        f"model's name {self.model!r} and the key (api_key or VLLM_API_KEY)."
                    ) from error
                asked_to_wait = _seconds(error.headers.get("Retry-After"))
            except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: the reply is not JSON
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                wait = min(LONGEST_WAIT, max(asked_to_wait, self.backoff * 2**attempt))
                logger.info("%s: %s; trying again in %.1f s", what, problem, wait)
                time.sleep(wait)
        raise ScorerError(
            f"{what}: {self.url}{path} failed {self.retries + 1} times, at last with {problem}; check that the server "
            "runs and is not out of memory, and raise timeout or lower batch_size if it is slow."
        )

    def _message(self, error: urllib.error.HTTPError) -> str:
        """The start of what the server says about an error, without the key."""
        try:
            text = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return "(the rest of the reply is missing)"
        return (text.replace(self._key, "***") if self._key else text)[:300]


def _log_probs(job: _Job, choice: dict[str, Any]) -> NDArray[np.float64]:
    """Log-probabilities of the answer's tokens, (T,), out of one choice of a reply."""
    positions = choice["prompt_logprobs"]
    if len(positions) != len(job.tokens):
        raise ValueError(f"prompt_logprobs of {len(positions)} tokens for a prompt of {len(job.tokens)}")
    values = []
    for i in range(len(job.tokens) - job.answer, len(job.tokens)):
        if (entry := positions[i].get(str(job.tokens[i]))) is None:
            raise ValueError(f"no log-probability of token {job.tokens[i]} at position {i}")
        value = math.nan if entry["logprob"] is None else float(entry["logprob"])
        values.append(-math.inf if value == MINUS_INFINITY else value)
    return np.array(values, dtype=np.float64)


def _text(job: _Job, choice: dict[str, Any]) -> str:
    if not isinstance(choice["text"], str):
        raise ValueError(f"text={choice['text']!r}")
    return choice["text"].strip()


def _seconds(header: str | None) -> float:
    """What a Retry-After header asks for; 0 if it names a date."""
    return float(header) if header and header.isdecimal() else 0.0
