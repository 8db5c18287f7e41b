"""Arguments of the GroupBeamGRPOTrainer."""

import math
from dataclasses import dataclass, field

from ..objectives.policy_losses import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES
from .schedules import KL_BETA_BOUNDS, StagePlan
from .selector_config import SelectorTrainingArguments


OLD_POLICY_REFRESH = ("never", "stage", "epoch", "steps")
KL_ESTIMATORS = ("exact", "k1", "k2", "k3")
KL_DIRECTIONS = ("reverse", "forward")
SCALE_REWARDS = ("group", "batch", "none", "rank")


@dataclass
class GroupBeamGRPOConfig(SelectorTrainingArguments):
    r"""
    Arguments of the [`GroupBeamGRPOTrainer`]: reward-weighted cross-entropy (RCE), then offline GRPO, in one run.

    > Parameters of the stages

    Args:
        rce_epochs (`float`, *optional*, defaults to `1.0`):
            Epochs of the RCE warm-up; 0 skips it. `num_train_epochs` is the sum of both stages and cannot be set to
            anything else.
        grpo_epochs (`float`, *optional*, defaults to `3.0`):
            Epochs of GRPO; 0 ends after RCE.
        curriculum_epochs (`float`, *optional*, defaults to `1.0`):
            How many of the GRPO epochs are early: only the best `curriculum_top_k` beams of a group count.
        curriculum_top_k (`int`, *optional*, defaults to `3`):
            Beams that count in the early stage. Their advantages are taken on the whole group, unless
            `curriculum_first` is set.
        curriculum_first (`bool`, *optional*, defaults to `False`):
            Whether to cut the group to its best beams *before* the advantages are taken: the literal original, which
            turns a good third beam into a negative.
        rce_learning_rate (`float`, *optional*, defaults to `1e-4`):
            Peak learning rate of RCE.
        learning_rate (`float`, *optional*, defaults to `3e-4`):
            Peak learning rate of both GRPO stages.
        warmup_ratio (`float`, *optional*, defaults to `0.1`):
            Share of RCE, and of GRPO, with a linear warm-up; a cosine to 0 follows. Takes the place of `warmup_steps`
            and `lr_scheduler_type`.
        restore_best (`bool`, *optional*, defaults to `True`):
            Whether GRPO starts from the best checkpoint so far (the start included) rather than from the end of RCE.

    > Parameters of RCE

    Args:
        rce_temperature_start, rce_temperature_end (`float`, *optional*, defaults to `2.0` and `0.5`):
            τ of the weights softmax(R / τ) at the first and the last step of the stage. Lower trusts the best beam
            more.
        rce_normalize (`bool`, *optional*, defaults to `True`):
            Whether to standardise scores in their group first. Without it scores of 0.03 to 0.05 give equal weights.

    > Parameters of GRPO

    Args:
        loss_type (`str`, *optional*, defaults to `"grpo"`):
            `"grpo"`, `"dr_grpo"`, `"cispo"`, `"sapo"`, `"rwr"`, `"listwise_kl"` or `"asymre"`; see
            [`~objectives.group_policy_loss`].
        importance_sampling_level (`str`, *optional*, defaults to `"joint"`):
            `"token"`, `"sequence"` (length-normalised) or `"joint"` (the exact ratio of the whole sequence).
        epsilon (`float`, *optional*, defaults to `0.2`):
            Clip range of the ratio. Raising it lets the policy move further between two refreshes of π_old.
        epsilon_high (`float`, *optional*):
            Upper clip range; by default `epsilon`.
        delta (`float`, *optional*):
            Upper bound of the unclipped ratio.
        sapo_temperature_pos, sapo_temperature_neg (`float`, *optional*, defaults to `1.0` and `1.05`):
            Gates of `"sapo"`.
        loss_temperature (`float`, *optional*, defaults to `0.5`):
            τ of the weights of `"rwr"` and `"listwise_kl"`, over standardised scores.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            `"group"`, `"batch"`, `"none"` or `"rank"`; see [`~objectives.group_advantages`].
        advantage_clip (`float`, *optional*, defaults to `5.0`):
            Bound of the advantages. With G beams no z-score exceeds (G − 1)/√G, so 5 acts from G = 28 on.
        baseline_shift (`float`, *optional*, defaults to `0.0`):
            How far the baseline lies below the group's mean, in standard deviations.
        old_policy_refresh (`str`, *optional*, defaults to `"epoch"`):
            When π_old becomes the current policy: `"never"` (fixed at the start of training: the policy can then
            hardly move), `"stage"`, `"epoch"` or `"steps"`.
        old_policy_refresh_steps (`int`, *optional*, defaults to `1`):
            Steps between refreshes with `"steps"`; 1 keeps the ratio at 1.
        entropy_coef (`float`, *optional*, defaults to `0.0`):
            Weight of an entropy bonus, in units of log K. Raising it keeps the policy softer.

    > Parameters of the KL term

    Args:
        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the KL to the start (π_ref). 0 leaves the term out.
        kl_estimator (`str`, *optional*, defaults to `"exact"`):
            `"exact"`: the KL of each step's whole distribution on the logged prefixes; `"k1"`, `"k2"`, `"k3"`:
            estimators from the logged picks alone.
        kl_direction (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"`: KL(π ‖ π_ref); `"forward"`: KL(π_ref ‖ π).
        adaptive_beta (`bool`, *optional*, defaults to `False`):
            Whether β follows the KL, see [`KLBetaCallback`].
        adaptive_temperature (`bool`, *optional*, defaults to `False`):
            Whether the policy's temperature follows the KL, see [`TemperatureCallback`].
        kl_low, kl_high (`float`, *optional*, defaults to `0.01` and `0.1`):
            Band inside which β and the temperature stay, in nats per step.
        kl_limit (`float`, *optional*):
            Checkpoints whose held-out KL to the start is above it are never the best. `None` for no limit.
        beta_factor (`float`, *optional*, defaults to `1.5`):
            Size of one move of β.
        beta_smoothing (`float`, *optional*, defaults to `0.5`):
            Weight of the past in the average of the KL that β follows. 0 with `logging_strategy="epoch"` is the
            literal rule per epoch.
        precompute_ref_log_probs (`bool`, *optional*, defaults to `False`):
            Whether to compute the reference's log-probabilities once, as a column of the data set. Only for the
            estimators at a fixed policy temperature; the exact KL needs whole distributions, computed per batch.

    > Parameters that control the logging

    Args:
        log_groups (`bool`, *optional*, defaults to `False`):
            Whether to show a table of groups while training: query, sequences, rewards, advantages, ratios (of rows
            their texts, where the trainer has `row_texts`, else their ids). It goes to the console, to
            `output_dir/groups/`, and to TensorBoard, trackio and W&B where `report_to` names them.
        log_groups_steps (`int`, *optional*, defaults to `10`):
            Steps between two tables.
        num_groups_to_log (`int`, *optional*, defaults to `2`):
            Groups of a table. Raising it makes long tables: a row for each sequence.

    The other arguments are those of [`SelectorTrainingArguments`]; `disable_dropout` defaults to `True` here, as in
    DPO. `False` regularises small data; policy and old policy then share their dropout masks.

    Example:

    ```python
    >>> from lever_grpo import GroupBeamGRPOConfig

    >>> args = GroupBeamGRPOConfig(output_dir="outputs/grpo", rce_epochs=1, grpo_epochs=3, report_to="none")
    >>> args.num_train_epochs
    4.0

    ```
    """

    num_train_epochs: float = field(
        default=0.0, metadata={"help": "Leave it out: it is rce_epochs + grpo_epochs, and nothing else is accepted."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Whether to switch off all dropout, so that ratios hold no noise."}
    )
    rce_epochs: float = field(default=1.0, metadata={"help": "Epochs of the RCE warm-up; 0 skips it."})
    grpo_epochs: float = field(default=3.0, metadata={"help": "Epochs of GRPO; 0 ends after RCE."})
    curriculum_epochs: float = field(default=1.0, metadata={"help": "GRPO epochs on the best beams only."})
    curriculum_top_k: int = field(default=3, metadata={"help": "Beams per group that count in the early stage."})
    curriculum_first: bool = field(
        default=False, metadata={"help": "Cut the group before the advantages are taken (the literal original)."}
    )
    rce_learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of RCE."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Peak learning rate of GRPO."})
    warmup_ratio: float = field(default=0.1, metadata={"help": "Share of each stage that warms up, in [0, 1]."})
    restore_best: bool = field(
        default=True, metadata={"help": "Whether GRPO starts from the best checkpoint so far, the start included."}
    )
    rce_temperature_start: float = field(default=2.0, metadata={"help": "τ at the first step of RCE."})
    rce_temperature_end: float = field(default=0.5, metadata={"help": "τ at the last step of RCE."})
    rce_normalize: bool = field(
        default=True, metadata={"help": "Standardise scores in the group before softmax(R/τ)."}
    )
    loss_type: str = field(default="grpo", metadata={"help": "Loss of the policy.", "choices": LOSS_TYPES})
    importance_sampling_level: str = field(
        default="joint", metadata={"help": "What a ratio is taken of.", "choices": IMPORTANCE_SAMPLING_LEVELS}
    )
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the ratio."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range; by default epsilon."})
    delta: float | None = field(default=None, metadata={"help": "Upper bound of the unclipped ratio."})
    sapo_temperature_pos: float = field(default=1.0, metadata={"help": "Gate of sapo for positive advantages."})
    sapo_temperature_neg: float = field(default=1.05, metadata={"help": "Gate of sapo for negative advantages."})
    loss_temperature: float = field(default=0.5, metadata={"help": "τ of the weights of rwr and listwise_kl."})
    scale_rewards: str = field(
        default="group", metadata={"help": "How advantages are scaled.", "choices": SCALE_REWARDS}
    )
    advantage_clip: float = field(default=5.0, metadata={"help": "Bound of the advantages."})
    baseline_shift: float = field(default=0.0, metadata={"help": "Baseline below the group's mean, in std."})
    old_policy_refresh: str = field(
        default="epoch", metadata={"help": "When the old policy is renewed.", "choices": OLD_POLICY_REFRESH}
    )
    old_policy_refresh_steps: int = field(default=1, metadata={"help": "Steps between refreshes with 'steps'."})
    entropy_coef: float = field(default=0.0, metadata={"help": "Weight of the entropy bonus, in units of log K."})
    beta: float = field(default=0.1, metadata={"help": "Weight of the KL to the start; 0 leaves it out."})
    kl_estimator: str = field(default="exact", metadata={"help": "How the KL is computed.", "choices": KL_ESTIMATORS})
    kl_direction: str = field(
        default="reverse", metadata={"help": "Which way the KL is taken.", "choices": KL_DIRECTIONS}
    )
    adaptive_beta: bool = field(default=False, metadata={"help": "Whether β follows the KL."})
    adaptive_temperature: bool = field(default=False, metadata={"help": "Whether the policy's temperature does."})
    kl_low: float = field(default=0.01, metadata={"help": "KL (nats per step) below which β falls."})
    kl_high: float = field(default=0.1, metadata={"help": "KL (nats per step) above which β rises."})
    kl_limit: float | None = field(
        default=None,
        metadata={"help": "Checkpoints whose held-out KL is above it are never the best (nats per step)."},
    )
    beta_factor: float = field(default=1.5, metadata={"help": "Size of one move of β."})
    beta_smoothing: float = field(
        default=0.5, metadata={"help": "Weight of the past in the KL that β follows, in [0, 1)."}
    )
    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Compute the reference's log-probabilities once (estimators only)."}
    )
    log_groups: bool = field(
        default=False,
        metadata={"help": "Whether to show groups while training: on the console, in a file and in the trackers."},
    )
    log_groups_steps: int = field(default=10, metadata={"help": "Steps between two tables of groups."})
    num_groups_to_log: int = field(default=2, metadata={"help": "Groups of a table, with all their sequences."})

    def __post_init__(self):
        if not (min(self.rce_epochs, self.grpo_epochs) >= 0 and 0 < self.rce_epochs + self.grpo_epochs < math.inf):
            raise ValueError(
                f"rce_epochs={self.rce_epochs} and grpo_epochs={self.grpo_epochs}: both must be numbers of at "
                "least 0, and one of them above."
            )
        planned = self.rce_epochs + self.grpo_epochs
        if self.num_train_epochs not in (0.0, planned):
            raise ValueError(
                f"num_train_epochs={self.num_train_epochs}, but the stages last rce_epochs + grpo_epochs = {planned}; "
                "set those and leave num_train_epochs out."
            )
        if self.warmup_steps or self.lr_scheduler_type not in ("linear", "cosine"):
            raise ValueError(
                f"warmup_steps={self.warmup_steps}, lr_scheduler_type={str(self.lr_scheduler_type)!r}: each stage has "
                "a warm-up of warmup_ratio and a cosine; set warmup_ratio and leave these out."
            )
        self.num_train_epochs = float(planned)
        super().__post_init__()
        self.check_choice("loss_type", LOSS_TYPES)
        self.check_choice("importance_sampling_level", IMPORTANCE_SAMPLING_LEVELS)
        self.check_choice("scale_rewards", SCALE_REWARDS)
        self.check_choice("old_policy_refresh", OLD_POLICY_REFRESH)
        self.check_choice("kl_estimator", KL_ESTIMATORS)
        self.check_choice("kl_direction", KL_DIRECTIONS)
        self._check_numbers()
        if self.adaptive_beta and not self.beta:
            raise ValueError("adaptive_beta=True with beta=0: there is no KL term to weigh; set beta above 0.")
        lowest, highest = KL_BETA_BOUNDS
        if self.adaptive_beta and not lowest <= self.beta <= highest:
            raise ValueError(f"adaptive_beta=True moves β between {lowest:g} and {highest:g}, and beta={self.beta}.")
        if (self.adaptive_beta or self.adaptive_temperature) and self.logging_strategy == "no":
            raise ValueError(
                "adaptive_beta and adaptive_temperature follow the logged KL, and logging_strategy='no' logs none; "
                "choose 'steps' or 'epoch'."
            )
        if self.curriculum_first and self.curriculum_top_k < 2 and self.curriculum_epochs > 0:
            raise ValueError(
                f"curriculum_first=True with curriculum_top_k={self.curriculum_top_k}: one beam has no advantage over "
                "itself, so that nothing would be learned; keep 2 or more."
            )
        if self.precompute_ref_log_probs and (self.kl_estimator == "exact" or self.adaptive_temperature):
            raise ValueError(
                "precompute_ref_log_probs=True stores log-probabilities of the logged picks at temperature 1; that "
                "does not serve kl_estimator='exact' (whole distributions) or adaptive_temperature=True: choose k1, "
                "k2 or k3 and a fixed temperature, or leave it False."
            )

    def _check_numbers(self) -> None:
        not_negative = ["curriculum_epochs", "beta", "baseline_shift", "entropy_coef", "kl_low", "kl_limit"]
        for name in (*not_negative, "rce_learning_rate"):
            self.check_range(name, low=0.0)
        positive = ["learning_rate", "rce_temperature_start", "rce_temperature_end", "loss_temperature"]
        positive += ["advantage_clip", "epsilon", "epsilon_high", "sapo_temperature_pos", "sapo_temperature_neg"]
        for name in positive:
            self.check_range(name, low=0.0, above=True)
        for name in ("curriculum_top_k", "old_policy_refresh_steps", "log_groups_steps", "num_groups_to_log"):
            self.check_range(name, low=1)
        self.check_range("warmup_ratio", low=0.0, high=1.0)
        self.check_range("beta_factor", low=1.0)
        self.check_range("beta_smoothing", low=0.0, high=1.0)
        self.check_range("kl_high", low=self.kl_low)
        highest = 1.0 + (self.epsilon if self.epsilon_high is None else self.epsilon_high)
        self.check_range("delta", low=highest, above=True)

    def stage_plan(self, max_steps: int) -> StagePlan:
        """The stages of a run of `max_steps` steps."""
        return StagePlan.from_epochs(max_steps, self.rce_epochs, self.grpo_epochs, self.curriculum_epochs)
