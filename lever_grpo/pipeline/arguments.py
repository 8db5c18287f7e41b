"""What a recipe is told: its own arguments and a trainer's, from YAML and the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..models import PRESETS
from ..trainer import SelectorTrainingArguments
from .parsing import parse_dataclasses


TrainingConfig = TypeVar("TrainingConfig", bound=SelectorTrainingArguments)


@dataclass
class RecipeArguments:
    r"""
    What a recipe needs beside the trainer's arguments.

    Args:
        task (`str`, *optional*, defaults to `"emoji"`):
            Task of the packaged sample, used when `beam_data` is not given.
        beam_data (`list[str]`, *optional*):
            Beam log(s) of the training queries, in any format of [`load_beams`].
        embeddings (`str`, *optional*):
            Embeddings of all rows: a `.safetensors` or `.npy` file, or a folder of them. Needed with `beam_data`.
        candidate_pools (`str`, *optional*):
            Side file with the pools, for logs that do not hold them.
        validation_data, heldout_data (`str`, *optional*):
            Beam logs of other queries: to choose checkpoints on, and to report on. Without them, shares of the
            training queries are set aside.
        entities (`str`, *optional*):
            JSON file `{"row id": "what the row is about"}` (an image, a person): splits keep rows about the same thing
            together, and no query's pool holds another row about its own thing.
        validation_size, heldout_size (`float`, *optional*, defaults to `0.2`):
            Those shares.
        heldout_fold (`int`, *optional*):
            Cross-validation: report on this part of the training queries, of `heldout_size` each (0, 1, …), instead of
            on held-out ones; scores that are missing are estimated.
        query_features, candidate_features (`list[str]`, *optional*):
            Embeddings that each side sees. Default: those of the sample, or all of the store; of the query's side all
            without "answer" in their name.
        similarity_features (`list[str]`, *optional*):
            Embeddings of the similarity baseline. Default: those by which the sample's pools are ranked, or all that
            the two sides share. `similarity_all` takes all that they share in any case.
        num_shots (`int`, *optional*, defaults to `2`):
            Length of the sequences that are learned and chosen.
        score_picks (`bool`, *optional*, defaults to `False`):
            Whether the frozen model is asked about greedy picks on validation queries that `validation_data` does not
            hold, so that checkpoints are chosen by what they pick where not every sequence was scored (three
            demonstrations and more). The model is that of the `manifest.json` beside that log; see [`PickScorer`].
        sources (`list[str]`, *optional*):
            Where the sequences that are learned from come from, as the log says it (`"search"`, `"random"`,
            `"similarity"`, `"selector"`); see [`keep_sources`]. Default: all.
        max_group_size (`int`, *optional*):
            Sequences kept per group: all survivors, and others evenly spaced by score. `None` keeps everything.
        max_samples (`int`, *optional*):
            Number of training queries to use, drawn with the seed.
        sft_ckpt (`str`, *optional*):
            Selector to start from (folder or Hub id). Without it, the supervised stage is run first.
        agreement_steps (`int`, *optional*, defaults to `0`):
            Steps of [`fit_answer_agreement`] at the start of post-training; kept where validation says that it helps.
        answer_feature (`str`, *optional*, defaults to `"answer"`):
            The embedding of the answers that it needs.
        sft_epochs, sft_learning_rate, sft_num_beams:
            The supervised stage: its epochs, peak learning rate, and the best beams that it imitates.
        model_preset (`str`, *optional*, defaults to `"v3"`):
            Version of the selector: `"v0"` (a sequence model), `"v1"` (bi-encoder), `"v2"` or `"v3"` (with
            cross-attention), `"prior"` (no network), …; and below it the options of its configuration that recipes
            set.
        model_init_kwargs (`dict`, *optional*):
            Any further options of its configuration, such as `{"state_update": "gru"}`; they come last.
        clip_model (`str`, *optional*):
            Of `"v2_lora"`: the CLIP that it starts from, a folder or a Hub id, with its processor.
        task_file (`str`, *optional*):
            The rows, as [`load_examples`] reads them: what `"v2_lora"` sees, and the texts in the table of
            `log_groups`; by default those of the sample's task, which come without images.
        dry_run (`bool`, *optional*, defaults to `False`):
            Check everything, run two steps of each stage, write nothing.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether an earlier run in `output_dir` may be deleted.
        resume_from_hub (`str`, *optional*):
            Model repository with the checkpoints of a run that was cut off (`hub_strategy="checkpoint"`): the run goes
            on from there. Where `output_dir` holds the run already, it goes on from that.
    """

    task: str = field(default="emoji", metadata={"help": "Task of the packaged sample, without --beam_data."})
    beam_data: list[str] | None = field(default=None, metadata={"help": "Beam log(s) of the training queries."})
    embeddings: str | None = field(default=None, metadata={"help": "Embeddings of all rows: a file or a folder."})
    candidate_pools: str | None = field(default=None, metadata={"help": "Side file with the candidate pools."})
    validation_data: str | None = field(default=None, metadata={"help": "Beam log to choose checkpoints on."})
    heldout_data: str | None = field(default=None, metadata={"help": "Beam log to report on."})
    entities: str | None = field(default=None, metadata={"help": "JSON file: row id -> what the row is about."})
    validation_size: float = field(default=0.2, metadata={"help": "Share of training queries, without such a log."})
    heldout_size: float = field(default=0.2, metadata={"help": "Share of training queries, without such a log."})
    heldout_fold: int | None = field(
        default=None, metadata={"help": "Cross-validation: the part of the training queries to report on."}
    )
    query_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of the query side."})
    candidate_features: list[str] | None = field(default=None, metadata={"help": "Embeddings of the candidates."})
    similarity_features: list[str] | None = field(
        default=None, metadata={"help": "Embeddings of the similarity baseline."}
    )
    num_shots: int = field(default=2, metadata={"help": "Length of the sequences."})
    min_shots: int | None = field(
        default=None, metadata={"help": "Shortest sequences to train on, for a selector that may stop."}
    )
    score_picks: bool = field(
        default=False,
        metadata={"help": "Whether the log's frozen model scores validation picks that the log does not hold."},
    )
    sources: list[str] | None = field(
        default=None, metadata={"help": "Sources of the sequences to learn from, as random selector; default all."}
    )
    max_group_size: int | None = field(default=None, metadata={"help": "Sequences kept per group; default all."})
    max_samples: int | None = field(default=None, metadata={"help": "Training queries to use; default all."})
    sft_ckpt: str | None = field(default=None, metadata={"help": "Selector to start from: a folder or a Hub id."})
    agreement_steps: int = field(
        default=0, metadata={"help": "Steps on the agreement of answers, before RCE; 0 leaves them out."}
    )
    answer_feature: str = field(default="answer", metadata={"help": "Embedding of the answers, for the agreement."})
    sft_epochs: float = field(default=5.0, metadata={"help": "Epochs of the supervised stage."})
    sft_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of the supervised stage."})
    sft_num_beams: int = field(default=5, metadata={"help": "Best beams that the supervised stage imitates."})
    model_preset: str = field(default="v3", metadata={"help": "Version of the selector.", "choices": tuple(PRESETS)})
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of the selector's configuration, as JSON."}
    )
    clip_model: str | None = field(default=None, metadata={"help": "CLIP of 'v2_lora': a folder or a Hub id."})
    task_file: str | None = field(default=None, metadata={"help": "Rows: what 'v2_lora' sees and log_groups shows."})
    hidden_dim: int = field(default=64, metadata={"help": "Width of the network."})
    num_set_layers: int = field(default=0, metadata={"help": "Self-attention layers among the candidates."})
    similarity_prior: bool = field(default=True, metadata={"help": "Whether to start exactly at similarity."})
    prior_rank: int = field(default=32, metadata={"help": "Rank of the learned change of the metric."})
    dropout: float = field(default=0.3, metadata={"help": "Dropout of the network and of the prior."})
    dry_run: bool = field(default=False, metadata={"help": "Check everything, run two steps a stage, write nothing."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to delete an earlier run in output_dir."})
    resume_from_hub: str | None = field(
        default=None, metadata={"help": "Repository with the checkpoints of a run that is to go on."}
    )

    def __post_init__(self) -> None:
        _ = self.model_options  # an error now, not after the data are read

    @property
    def model_options(self) -> dict[str, Any]:
        """`model_init_kwargs`, of the command line too."""
        given = self.model_init_kwargs or {}
        try:
            options = json.loads(given) if isinstance(given, str) else given
        except json.JSONDecodeError as error:
            raise ValueError(f"model_init_kwargs={given!r} is no JSON: {error}.") from error
        if not isinstance(options, dict):
            raise ValueError(f'model_init_kwargs={given!r}: expected options and values, as in {{"stop": true}}.')
        return options


def parse(arguments: Sequence[str], config: type[TrainingConfig]) -> tuple[RecipeArguments, TrainingConfig]:
    """
    A recipe's arguments: those of `--config FILE` (YAML), and on top of them those of the command line.

    Raises:
        ValueError: for a key that no argument has.
    """
    recipe, args = parse_dataclasses([RecipeArguments, config], arguments)
    settle_resume(args)
    return recipe, args


def settle_resume(args: SelectorTrainingArguments) -> None:
    """Makes `resume_from_checkpoint` `"true"` or `None`, or raises a `ValueError`."""
    resume = str(args.resume_from_checkpoint or "false").lower()
    if resume not in ("true", "false"):
        raise ValueError(
            f"resume_from_checkpoint={args.resume_from_checkpoint!r}: must be true or false; a run that is continued "
            "finds the last whole checkpoint of its output_dir itself."
        )
    args.resume_from_checkpoint = "true" if resume == "true" else None
