"""The supervised stage: imitate the best beams of every group."""

from dataclasses import dataclass, field

from ..objectives import curriculum_mask, rce_loss
from .selector_config import SelectorTrainingArguments
from .selector_trainer import SelectorTrainer, masked_mean


@dataclass
class SelectorSFTConfig(SelectorTrainingArguments):
    r"""
    Arguments of the [`SelectorSFTTrainer`].

    Args:
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Peak learning rate.
        num_beams (`int`, *optional*, defaults to `5`):
            Best beams of each group that are imitated, all with the same weight. Raising it imitates worse sequences.

    The other arguments are those of [`SelectorTrainingArguments`].

    Example:

    ```python
    >>> from lever_grpo import SelectorSFTConfig

    >>> args = SelectorSFTConfig(output_dir="outputs/sft", num_train_epochs=5, report_to="none")
    >>> args.num_beams
    5

    ```
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate."})
    num_beams: int = field(default=5, metadata={"help": "Best beams of each group that are imitated."})

    def __post_init__(self):
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams}: at least one beam must be imitated.")
        super().__post_init__()


class SelectorSFTTrainer(SelectorTrainer):
    r"""
    Supervised training of a selector on the best beams of each group:
    \\( L = -\frac{1}{n} \sum_{i \in \text{top } n} \log \pi(y_i \mid q) \\).

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The selector, or the folder or Hub id of one.
        args ([`SelectorSFTConfig`]):
            Arguments.
        data_collator ([`DataCollatorForBeams`]):
            Makes batches of groups.
        train_dataset, eval_dataset (`datasets.Dataset`):
            Rows of [`load_beams`].
        peft_config (`peft.PeftConfig`, *optional*):
            Trains an adapter instead of the whole selector.
        score_picks (`Callable`, *optional*):
            As in [`GroupBeamGRPOTrainer`].
        **kwargs:
            Passed to [`~transformers.Trainer`].
    """

    _tag_names = ["lever-grpo", "sft"]
    args: SelectorSFTConfig

    def group_losses(self, model, inputs, rewards):
        output = self.policy(model, inputs)
        mask = inputs["sequence_mask"].any(-1)
        best = curriculum_mask(rewards, mask, top_k=self.args.num_beams)  # (B, G)
        weights = best / best.sum(-1, keepdim=True).clamp(min=1)
        losses = rce_loss(output.log_probs, weights.to(output.log_probs.dtype), output.step_mask)
        return losses, self.live_groups(rewards, inputs), {"reward": masked_mean(rewards, mask)}
