"""Callbacks that drive what the loss reads: stage and curriculum, temperatures, the weight of the KL term."""

from dataclasses import dataclass

from transformers import TrainerCallback

from .schedules import KL_BETA_BOUNDS, StagePlan, adapt, linear


@dataclass
class PolicyControl:
    """
    The values that schedules move and the loss reads; they travel with every checkpoint.

    Args:
        stage (`str`, *optional*, defaults to `"rce"`):
            `"rce"`, `"grpo_early"` or `"grpo_late"`.
        top_k (`int`, *optional*):
            Beams of each group that the curriculum lets through; `None` for all.
        temperature (`float`, *optional*, defaults to `1.0`):
            τ of the reward-weighted cross-entropy.
        policy_temperature (`float`, *optional*, defaults to `1.0`):
            Divides the policy's logits in the GRPO stages.
        beta (`float`, *optional*, defaults to `0.1`):
            Weight of the KL term.
        kl_average (`float`, *optional*):
            Moving average of the logged KL, `None` before the first log.
    """

    stage: str = "rce"
    top_k: int | None = None
    temperature: float = 1.0
    policy_temperature: float = 1.0
    beta: float = 0.1
    kl_average: float | None = None


class CurriculumCallback(TrainerCallback):
    """
    Sets `control.stage`, and lets only the best `top_k` beams of each group through while GRPO is early.

    Args:
        control ([`PolicyControl`]):
            What is driven.
        rce_epochs, grpo_epochs, curriculum_epochs (`float`):
            Lengths of the stages, in epochs; see [`~trainer.schedules.StagePlan`].
        top_k (`int`, *optional*, defaults to `3`):
            Beams that count in the early stage.

    Example:

    ```python
    >>> from transformers import TrainerControl, TrainerState
    >>> from lever_grpo import CurriculumCallback, PolicyControl

    >>> control = PolicyControl()
    >>> callback = CurriculumCallback(control, rce_epochs=1, grpo_epochs=3, curriculum_epochs=1)
    >>> _ = callback.on_step_begin(None, TrainerState(global_step=12, max_steps=40), TrainerControl())
    >>> control.stage, control.top_k
    ('grpo_early', 3)

    ```
    """

    def __init__(
        self,
        control: PolicyControl,
        rce_epochs: float,
        grpo_epochs: float,
        curriculum_epochs: float,
        top_k: int = 3,
    ):
        self.control = control
        self.epochs = (rce_epochs, grpo_epochs, curriculum_epochs)
        self.top_k = top_k

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        self.control.stage = StagePlan.from_epochs(state.max_steps, *self.epochs).stage(state.global_step)
        self.control.top_k = self.top_k if self.control.stage == "grpo_early" else None


class RestoreBestCallback(TrainerCallback):
    """
    Judges and saves the end of RCE, so that it is a candidate for what GRPO starts from wherever that end falls.
    """

    def on_step_end(self, args, state, control, **kwargs):
        with_epoch = args.eval_strategy == "epoch" and float(state.epoch or 0.0).is_integer()  # judged in a moment
        if state.global_step == args.stage_plan(state.max_steps).rce and not with_epoch:
            control.should_evaluate = True
            control.should_save = control.should_save or args.save_strategy != "best"  # which saves what is better


class TemperatureCallback(TrainerCallback):
    """
    Lowers the temperature of the reward weights in a straight line over the RCE stage and, if asked, adapts the
    policy's own temperature to the KL in the GRPO stages: a policy that runs away is softened, one that does not move
    is sharpened.

    Args:
        control ([`PolicyControl`]):
            What is driven.
        rce_epochs, grpo_epochs (`float`):
            Lengths of the stages, in epochs.
        start, end (`float`, *optional*, defaults to `2.0` and `0.5`):
            τ at the first and at the last step of the RCE stage.
        adaptive (`bool`, *optional*, defaults to `False`):
            Whether to adapt the policy's temperature.
        kl_low, kl_high (`float`, *optional*, defaults to `0.01` and `0.1`):
            Band of the KL (in nats per step) inside which it stays.
        factor (`float`, *optional*, defaults to `1.05`):
            Size of one move, one per log.
        bounds (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`):
            Limits of the policy's temperature.
    """

    def __init__(
        self,
        control: PolicyControl,
        rce_epochs: float,
        grpo_epochs: float,
        start: float = 2.0,
        end: float = 0.5,
        adaptive: bool = False,
        kl_low: float = 0.01,
        kl_high: float = 0.1,
        factor: float = 1.05,
        bounds: tuple[float, float] = (0.5, 2.0),
    ):
        self.control = control
        self.epochs = (rce_epochs, grpo_epochs)
        self.start, self.end = start, end
        self.adaptive = adaptive
        self.band = (kl_low, kl_high)
        self.factor, self.bounds = factor, bounds

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_begin(args, state, control)

    def on_step_begin(self, args, state, control, **kwargs):
        plan = StagePlan.from_epochs(state.max_steps, *self.epochs, curriculum_epochs=0)
        in_rce = plan.stage(state.global_step) == "rce"
        self.control.temperature = linear(self.start, self.end, plan.progress(state.global_step) if in_rce else 1.0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.adaptive and "kl" in (logs or {}):
            self.control.policy_temperature = adapt(
                self.control.policy_temperature, logs["kl"], *self.band, self.factor, *self.bounds
            )


class KLBetaCallback(TrainerCallback):
    """
    Adapts the weight of the KL term to the KL (Schulman et al., 2017, section 4), once per log and on a moving
    average: one noisy batch cannot run it to its bounds.

    Args:
        control ([`PolicyControl`]):
            What is driven.
        kl_low, kl_high (`float`, *optional*, defaults to `0.01` and `0.1`):
            Band of the KL (in nats per step) inside which β stays.
        factor (`float`, *optional*, defaults to `1.5`):
            Size of one move.
        bounds (`tuple[float, float]`, *optional*, defaults to `(1e-3, 10.0)`):
            Limits of β.
        smoothing (`float`, *optional*, defaults to `0.5`):
            Weight of the past in the moving average; 0 uses the last log alone.

    Example:

    ```python
    >>> from lever_grpo import KLBetaCallback, PolicyControl

    >>> control = PolicyControl(beta=0.1)
    >>> callback = KLBetaCallback(control)
    >>> callback.on_log(None, None, None, logs={"kl": 0.3})
    >>> round(control.beta, 3)
    0.15

    ```
    """

    def __init__(
        self,
        control: PolicyControl,
        kl_low: float = 0.01,
        kl_high: float = 0.1,
        factor: float = 1.5,
        bounds: tuple[float, float] = KL_BETA_BOUNDS,
        smoothing: float = 0.5,
    ):
        self.control = control
        self.band = (kl_low, kl_high)
        self.factor, self.bounds = factor, bounds
        self.smoothing = smoothing

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "kl" not in (logs or {}):
            return
        past = self.control.kl_average
        kl = logs["kl"] if past is None else self.smoothing * past + (1 - self.smoothing) * logs["kl"]
        self.control.kl_average = kl
        self.control.beta = adapt(self.control.beta, kl, *self.band, self.factor, *self.bounds)
