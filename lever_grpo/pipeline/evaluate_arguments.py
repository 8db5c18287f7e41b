"""What an evaluation by answers depends on, from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .frozen_model import FrozenModelArguments, TaskArguments
from .parsing import parse_dataclasses


METRICS = {
    "accuracy": "accuracy of the answer",
    "log_prob": "log-probability of the right answer, a token",
    "token_f1": "F1 of the answer's words",
    "cider": "CIDEr of the caption",
}
BASELINES = ("zero_shot", "random", "similarity", "similarity_image", "similarity_all", "mix", "mmr", "oracle")


@dataclass
class EvaluateArguments(TaskArguments, FrozenModelArguments):
    r"""
    Everything that an evaluation depends on: beside what follows, the fields of [`TaskArguments`] and of
    [`FrozenModelArguments`].

    Args:
        selectors (`list[str]`, *optional*):
            Selectors to compare, as `name=path`, path a folder or a Hub id. A name that is given several times has
            several seeds. `sft`, `rce` and `grpo` are names that reports know.
        log (`str`, *optional*):
            Beam log of the queries, for their pools and the best logged sequences; default: the held-out queries of
            the sample's task.
        candidate_pools (`str`, *optional*):
            A file with the pools, instead of a log. A query is taken out of its own pool, and so are rows about the
            same thing.
        num_queries (`int`, *optional*):
            Queries to use, drawn with the seed; default all.
        num_shots (`list[int]`, *optional*, defaults to `[1, 2]`):
            Numbers of demonstrations; each is a table of its own.
        baselines (`list[str]`, *optional*):
            Default: all that the data allow, of `zero_shot`, `random`, `similarity` (the features that the sample's
            pools are ranked by, or `similarity_features`), `similarity_image` (the feature `image`), `similarity_all`
            (all features that both sides share), `mix` (text and image in turn), `mmr` (similarity with diversity),
            `oracle` (the best sequence of the log).
        query_features, candidate_features, similarity_features (`list[str]`, *optional*):
            What baselines see, as in [`RecipeArguments`]; an evaluation shows a selector the embeddings that its own
            config names.
        metrics (`list[str]`, *optional*, defaults to `["accuracy", "log_prob"]`):
            What answers are judged by: `accuracy`, `log_prob` (of the right answer, a token), `token_f1`, or, for
            captions, `cider`.
        random_draws (`int`, *optional*, defaults to `5`):
            Random sequences of each query; their mean is reported.
        mmr_trade_off (`float`, *optional*, defaults to `0.5`):
            λ of [`mmr_picks`].
        construct_order (`str`, *optional*, defaults to `"left"`):
            Where a search puts a new demonstration; decides on the order in the prompt.
        max_new_tokens (`int`, *optional*, defaults to `10`):
            Longest answer, in tokens.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts that are asked together and then written: what a kill costs at most.
        gallery_queries (`int`, *optional*, defaults to `100`):
            Queries that the page shows one by one.
        seed (`int`, *optional*, defaults to `0`):
            Of the drawn queries and the random sequences.
        output_dir (`str`, *optional*, defaults to `"outputs/evaluation"`):
            Folder of the report, and of the answers that are kept.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether answers that another model or task left in `output_dir` may be deleted.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Example:

    ```python
    >>> from lever_grpo.pipeline.evaluate import EvaluateArguments
    >>> arguments = EvaluateArguments(selectors=["sft=a/sft", "grpo=a/grpo", "grpo=b/grpo"])
    >>> arguments.seeds_of
    {'sft': ['a/sft'], 'grpo': ['a/grpo', 'b/grpo']}

    ```
    """

    selectors: list[str] = field(default_factory=list, metadata={"help": "Selectors, as name=path; repeat for seeds."})
    log: str | None = field(default=None, metadata={"help": "Beam log of the queries; default: the sample's."})
    candidate_pools: str | None = field(default=None, metadata={"help": "File with the pools, instead of a log."})
    num_queries: int | None = field(default=None, metadata={"help": "Queries to draw; default all."})
    num_shots: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "Numbers of demonstrations."})
    baselines: list[str] | None = field(
        default=None, metadata={"help": "Methods to compare with; default all.", "choices": BASELINES}
    )
    query_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of the query side."})
    candidate_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of the candidates."})
    similarity_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of similarity."})
    metrics: list[str] = field(
        default_factory=lambda: ["accuracy", "log_prob"],
        metadata={"help": "What answers are judged by.", "choices": tuple(METRICS)},
    )
    random_draws: int = field(default=5, metadata={"help": "Random sequences of a query."})
    mmr_trade_off: float = field(default=0.5, metadata={"help": "Weight of similarity against diversity, 0 to 1."})
    construct_order: str = field(
        default="left", metadata={"help": "Where a new demonstration stands.", "choices": ("left", "right")}
    )
    max_new_tokens: int = field(default=10, metadata={"help": "Longest answer, in tokens."})
    batch_size: int = field(default=256, metadata={"help": "Prompts that are asked, and written, together."})
    gallery_queries: int = field(default=100, metadata={"help": "Queries that the page shows one by one."})
    seed: int = field(default=0, metadata={"help": "Of the drawn queries and the random sequences."})
    output_dir: str = field(default="outputs/evaluation", metadata={"help": "Folder of report and answers."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to delete answers of other settings there."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bar."})

    def __post_init__(self) -> None:
        TaskArguments.__post_init__(self)
        FrozenModelArguments.__post_init__(self)
        for name in ("random_draws", "batch_size", "max_new_tokens", "num_queries"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not self.num_shots or min(self.num_shots) < 1:
            raise ValueError(f"num_shots={self.num_shots}: name numbers from 1 on; zero-shot is a row of each table.")
        if not self.metrics or set(self.metrics) - METRICS.keys():
            raise ValueError(f"metrics={self.metrics}: must be of {', '.join(METRICS)}.")
        unknown = sorted(set(self.baselines or ()) - set(BASELINES))
        if unknown:
            raise ValueError(f"baselines={unknown}: must be of {', '.join(BASELINES)}.")
        if self.log is not None and self.candidate_pools is not None:
            raise ValueError(f"log={self.log!r} and candidate_pools={self.candidate_pools!r}: give one of them.")
        _ = self.seeds_of

    @property
    def seeds_of(self) -> dict[str, list[str]]:
        """Paths of each selector's seeds, by name."""
        seeds: dict[str, list[str]] = {}
        for selector in self.selectors:
            name, found, path = selector.partition("=")
            if not found or not name.isidentifier() or not path or name in BASELINES:
                raise ValueError(
                    f"selectors={selector!r}: expected name=path, the name of letters, digits and _, and none of "
                    f"{', '.join(BASELINES)}."
                )
            if "_minus_" in f"{name}_":
                raise ValueError(
                    f"selectors={selector!r}: the name {name!r} must not have '_minus' as a word, which in reports "
                    "stands between the two of a difference; give it another name."
                )
            seeds.setdefault(name, []).append(path)
        return seeds


def parse_evaluate(arguments: Sequence[str]) -> EvaluateArguments:
    """
    Arguments of `--config FILE` (YAML), and on top of them those of the command line.

    Raises:
        ValueError: for a key that no argument has.
    """
    (parsed,) = parse_dataclasses([EvaluateArguments], arguments, prog="lever-grpo evaluate")
    return parsed
