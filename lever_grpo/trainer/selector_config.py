"""Arguments that the supervised stage and the post-training stages share."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..objectives.rewards import AGGREGATIONS


REWARD_LEVELS = ("beam", "coherence", "diversity", "task")


@dataclass
class SelectorTrainingArguments(TrainingArguments):
    r"""
    Arguments that [`SelectorSFTTrainer`] and [`GroupBeamGRPOTrainer`] share, on top of
    [`~transformers.TrainingArguments`].

    Args:
        reward (`str`, *optional*, defaults to `"score"`):
            Beam-level reward: the group's score, another column of the log, or the name of a reward preset.
        reward_weights (`dict[str, float]`, *optional*):
            Weights of the reward's levels `"beam"`, `"coherence"`, `"diversity"` and `"task"`. `None` is
            `{"beam": 1.0}`.
        task_reward (`str`, *optional*):
            Column or preset of the `"task"` level.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How levels are summed; `"normalize_then_sum"` standardises each in its group first.
        disable_dropout (`bool`, *optional*, defaults to `False`):
            Whether to switch off all dropout of the model.
        resume_from_checkpoint (`str`, *optional*):
            For the recipes and `lever-grpo train`: whether to go on from the last whole checkpoint (`"true"`).

    Some defaults differ from [`~transformers.TrainingArguments`]: `per_device_train_batch_size` and
    `per_device_eval_batch_size` 32 (queries), `logging_steps` 10, `eval_strategy` and `save_strategy` `"epoch"`,
    `load_best_model_at_end`, `eval_on_start` (the start is the first candidate for the best checkpoint) and
    `weight_decay` 0.01. `metric_for_best_model` is chosen from the held-out log when it is left out: the reward of the
    greedy pick where every sequence of every held-out query was scored or the trainer is given `score_picks`, else the
    expected reward; of several held-out logs the first one's.
    """

    per_device_train_batch_size: int = field(default=32, metadata={"help": "Queries (groups) per device and step."})
    per_device_eval_batch_size: int = field(
        default=32, metadata={"help": "Queries (groups) per device in evaluation."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW. Raising it regularises more."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two logs."})
    eval_strategy: str = field(default="epoch", metadata={"help": "When to evaluate: 'no', 'steps' or 'epoch'."})
    save_strategy: str = field(default="epoch", metadata={"help": "When to save: 'no', 'steps', 'epoch' or 'best'."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Whether to end with the best checkpoint."})
    eval_on_start: bool = field(
        default=True, metadata={"help": "Whether to evaluate the start, so that it can be the best checkpoint."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay False: the collator reads all."})
    reward: str = field(default="score", metadata={"help": "Beam-level reward: a column of the log or a preset."})
    reward_weights: dict[str, float] | str | None = field(
        default=None, metadata={"help": "Weights of the levels beam, coherence, diversity, task (as JSON)."}
    )
    task_reward: str | None = field(default=None, metadata={"help": "Column or preset of the task level."})
    multi_objective_aggregation: str = field(
        default="sum_then_normalize", metadata={"help": "How levels are summed.", "choices": AGGREGATIONS}
    )
    disable_dropout: bool = field(default=False, metadata={"help": "Whether to switch off all dropout."})

    # a switch; the recipes find the last whole checkpoint themselves
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={"help": "Whether to go on from the last whole checkpoint.", "nargs": "?", "const": "true"},
    )

    # fields that may come as a JSON string from the command line
    _VALID_DICT_FIELDS = TrainingArguments._VALID_DICT_FIELDS + ["reward_weights"]

    def __post_init__(self):
        # known only with the data: the trainer fills it in (TrainingArguments would take "loss")
        automatic = self.metric_for_best_model is None
        if self.eval_strategy == "no":
            self.load_best_model_at_end = self.eval_on_start = False
        super().__post_init__()
        if automatic:
            self.metric_for_best_model = None
        if isinstance(self.reward_weights, str):
            raise ValueError(
                f"reward_weights={self.reward_weights!r}: must be a JSON object such as '{{\"beam\": 1.0}}'."
            )
        weights = {"beam": 1.0} if self.reward_weights is None else self.reward_weights
        unknown = set(weights) - set(REWARD_LEVELS)
        if unknown:
            raise ValueError(f"reward_weights has {sorted(unknown)}: the levels are {', '.join(REWARD_LEVELS)}.")
        if not any(weights.values()):
            raise ValueError(f"reward_weights={weights}: at least one level needs a weight that is not 0.")
        if weights.get("task") and self.task_reward is None:
            raise ValueError("reward_weights has 'task': name its column or preset with task_reward.")
        self.check_choice("multi_objective_aggregation", AGGREGATIONS)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop the columns of the log; leave it False.")

    def check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        """Raises `ValueError` when the field `name` is none of `choices`."""
        if getattr(self, name) not in choices:
            raise ValueError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(choices)}.")

    def check_range(self, name: str, low: float = -math.inf, high: float = math.inf, above: bool = False) -> None:
        """Raises `ValueError` when the field `name` is a number outside `[low, high]` (or not `above` `low`)."""
        value = getattr(self, name)
        if value is None or (low < value if above else low <= value) and value <= high:
            return
        lower = [f"above {low:g}" if above else f"at least {low:g}"] if low > -math.inf else []
        upper = [f"at most {high:g}"] if high < math.inf else []
        raise ValueError(f"{name}={value}: must be {' and '.join(lower + upper)}.")
