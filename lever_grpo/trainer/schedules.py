"""When what applies: pure functions of the step, so that a resumed run needs no stored counter."""

import math
from dataclasses import dataclass


STAGES = ("rce", "grpo_early", "grpo_late")
KL_BETA_BOUNDS = (1e-3, 10.0)  # of an adaptive β


@dataclass(frozen=True)
class StagePlan:
    """
    Which steps belong to which stage.

    Args:
        rce (`int`):
            Steps of the reward-weighted cross-entropy warm-up.
        grpo_early (`int`):
            Steps of GRPO on the best beams of each group.
        grpo_late (`int`):
            Steps of GRPO on whole groups.

    Example:

    ```python
    >>> from lever_grpo.trainer.schedules import StagePlan

    >>> plan = StagePlan.from_epochs(max_steps=40, rce_epochs=1, grpo_epochs=3, curriculum_epochs=1)
    >>> plan
    StagePlan(rce=10, grpo_early=10, grpo_late=20)
    >>> plan.stage(10), plan.progress(10), plan.progress(19)
    ('grpo_early', 0.0, 1.0)

    ```
    """

    rce: int
    grpo_early: int
    grpo_late: int

    @classmethod
    def from_epochs(
        cls, max_steps: int, rce_epochs: float, grpo_epochs: float, curriculum_epochs: float
    ) -> "StagePlan":
        """
        Cuts `max_steps` in proportion to the epochs of each stage; `curriculum_epochs` of the `grpo_epochs` are early.
        """
        total = rce_epochs + grpo_epochs
        # the ends of the stages are rounded, not their lengths: those could sum to more than there are steps
        rce_end = round(max_steps * rce_epochs / total)
        early_end = round(max_steps * (rce_epochs + min(curriculum_epochs, grpo_epochs)) / total)
        return cls(rce_end, early_end - rce_end, max_steps - early_end)

    @property
    def steps(self) -> tuple[int, int, int]:
        return (self.rce, self.grpo_early, self.grpo_late)

    def start(self, stage: str) -> int:
        """First step of a stage."""
        return sum(self.steps[: STAGES.index(stage)])

    def stage(self, step: int) -> str:
        """Stage of the optimisation step `step` (0-based); the last stage with steps for any later one."""
        for name, length in zip(STAGES, self.steps, strict=True):
            if step < length:
                return name
            step -= length
        return [name for name, length in zip(STAGES, self.steps, strict=True) if length][-1]

    def progress(self, step: int) -> float:
        """Place of the step in its stage: 0 at the stage's first step, 1 at its last."""
        stage = self.stage(step)
        return min(1.0, (step - self.start(stage)) / max(1, self.steps[STAGES.index(stage)] - 1))


def linear(start: float, end: float, progress: float) -> float:
    """Straight line from `start` at progress 0 to `end` at progress 1."""
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def warmup_cosine(step: int, steps: int, warmup_ratio: float) -> float:
    """
    Linear warm-up over `warmup_ratio` of the steps, then half a cosine to zero; a factor in `[0, 1]`.

    The first step already moves: its factor is `1 / warm-up steps`, not 0.
    """
    warmup = math.ceil(round(steps * warmup_ratio, 6))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def adapt(value: float, kl: float, low: float, high: float, factor: float, minimum: float, maximum: float) -> float:
    """
    One move of a proportional controller: `value` times `factor` where `kl` is above `high`, divided by it where `kl`
    is below `low`, unchanged inside the band; kept in `[minimum, maximum]`.
    """
    if kl > high:
        value *= factor
    elif kl < low:
        value /= factor
    return min(max(value, minimum), maximum)
