"""What a beam log depends on, from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..scorers.scores import SCORES
from ..search.beam_search import ABSOLUTE, JUDGED, SearchConfig
from ..search.judges import COLUMNS
from ..search.samplers import METHODS, parse_ratios
from .frozen_model import FrozenModelArguments, TaskArguments
from .parsing import parse_dataclasses


SPLITS = ("all", "train", "heldout")


@dataclass
class GenerateArguments(TaskArguments, FrozenModelArguments):
    r"""
    Everything that a beam log depends on: beside what follows, the fields of [`TaskArguments`] and of
    [`FrozenModelArguments`].

    Args:
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
        text_feature, image_feature (`str`, *optional*, default to `"question"` and `"image"`):
            Their names in the embeddings.
        text_encoder, image_encoder (`str`, *optional*):
            Folder or Hub id of an encoder, also where there are embeddings; see [`encode_texts`], [`encode_images`].
        text_encoder_revision, image_encoder_revision (`str`, *optional*):
            Branch, tag or commit of the encoder on the Hub.
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

    split: str = field(default="all", metadata={"help": "Whose queries.", "choices": SPLITS})
    heldout_share: float = field(default=0.0, metadata={"help": "Share of the rows that is never a candidate."})
    num_queries: int | None = field(default=None, metadata={"help": "Queries to draw; default all."})
    query_ids: list[int] | None = field(default=None, metadata={"help": "Row ids of the queries."})
    sampler: str = field(default="text_sim", metadata={"help": "How pools are chosen.", "choices": (*METHODS, "mix")})
    pool_size: int = field(default=64, metadata={"help": "Candidates of a query; costs grow in proportion."})
    ratios: list[str] | None = field(default=None, metadata={"help": "Shares of mix: text_sim=0.5 image_sim=0.25."})
    candidate_pools: str | None = field(default=None, metadata={"help": "File with the pools, instead of a sampler."})
    text_feature: str = field(default="question", metadata={"help": "Embedding that text_sim compares."})
    image_feature: str = field(default="image", metadata={"help": "Embedding that image_sim compares."})
    text_encoder: str | None = field(default=None, metadata={"help": "Encoder of questions: a folder or a Hub id."})
    image_encoder: str | None = field(default=None, metadata={"help": "Encoder of images: a folder or a Hub id."})
    text_encoder_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    image_encoder_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    num_shots: int = field(default=2, metadata={"help": "Demonstrations of the survivors, 1 to 8."})
    beam_size: int = field(default=5, metadata={"help": "Sequences that are extended; costs grow in proportion."})
    score: str = field(
        default="infoscore", metadata={"help": "What sequences are scored by.", "choices": (*SCORES, ABSOLUTE)}
    )
    construct_order: str = field(
        default="left", metadata={"help": "Where a new demonstration stands.", "choices": ("left", "right")}
    )
    unordered: bool = field(default=False, metadata={"help": "Whether a set is scored in one order only."})
    random_sequences: int = field(default=0, metadata={"help": "Random sequences a query, for contrast."})
    similarity_sequences: int = field(default=0, metadata={"help": "Runs of the pool's order, for contrast."})
    judge: str = field(default="none", metadata={"help": "Whose answers are judged.", "choices": JUDGED})
    judge_by: str = field(default="accuracy", metadata={"help": "What answers are worth.", "choices": tuple(COLUMNS)})
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
        TaskArguments.__post_init__(self)
        FrozenModelArguments.__post_init__(self)
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} must be one of {', '.join(SPLITS)}.")
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
        for name in ("text_encoder", "image_encoder"):
            revision = getattr(self, f"{name}_revision")
            if revision is not None and getattr(self, name) is None:
                raise ValueError(f"{name}_revision={revision!r} is of an encoder of the Hub; name it by {name}.")
        if not self.log_name.endswith((".jsonl", ".parquet")) or Path(self.log_name).name != self.log_name:
            raise ValueError(f"log_name={self.log_name!r} must be a file name that ends on .jsonl or .parquet.")
        _ = self.search, self.shares  # wrong values are named at once

    @property
    def search(self) -> SearchConfig:
        """The fields of the search."""
        return SearchConfig(**{name: getattr(self, name) for name in SearchConfig.__dataclass_fields__})

    @property
    def embeddings_cache(self) -> Path:
        """Where embeddings and pools are kept: in `cache_dir`, or in the log's folder until it has its pools."""
        return Path(self.cache_dir or Path(self.output_dir, "cache"))

    @property
    def shares(self) -> dict[str, float] | None:
        """`ratios` as numbers."""
        return parse_ratios(self.ratios)


def parse_generate(arguments: Sequence[str]) -> GenerateArguments:
    """
    Arguments of `--config FILE` (YAML), and on top of them those of the command line.

    Raises:
        ValueError: for a key that no argument has.
    """
    (parsed,) = parse_dataclasses([GenerateArguments], arguments, prog="lever-grpo generate")
    return parsed
