"""What the page depends on, from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..pipeline.evaluate_arguments import BASELINES, EvaluateArguments
from ..pipeline.parsing import parse_dataclasses


@dataclass
class DemoArguments(EvaluateArguments):
    r"""
    Everything that the page depends on: beside what follows, the fields of [`EvaluateArguments`], so that a config of
    `lever-grpo evaluate` is one of `lever-grpo demo` too. Those that are about its report only (`metrics`,
    `output_dir`, …) change nothing here.

    Args:
        sft, grpo (`str`, *optional*):
            Selectors by those names, folders or Hub ids; with one of them, `selectors` is not looked at. Of several
            seeds of a selector, the page shows the first.
        baselines (`list[str]`, *optional*, defaults to `["random", "similarity"]`):
            As in [`EvaluateArguments`]; of `random`, the first draw is shown.
        ask (`bool`, *optional*, defaults to `True`):
            Whether the frozen model answers. Without it, the page shows picks and log-probabilities only.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen at. Any but this machine's own lets others use the page, which has no password.
        port (`int`, *optional*):
            Its port; default: the first free one from 7860 on.
        share (`bool`, *optional*, defaults to `False`):
            Whether to let Gradio tunnel the page to a public address, through servers of others.

    Example:

    ```python
    >>> from lever_grpo.demo import DemoArguments
    >>> DemoArguments(selectors=["rce=a/rce"], sft="a/sft", grpo="a/grpo").seeds_of
    {'sft': ['a/sft'], 'grpo': ['a/grpo']}

    ```
    """

    sft: str | None = field(default=None, metadata={"help": "Selector `sft`, instead of those of selectors."})
    grpo: str | None = field(default=None, metadata={"help": "Selector `grpo`, instead of those of selectors."})
    baselines: list[str] | None = field(
        default_factory=lambda: ["random", "similarity"], metadata={"help": f"Of {', '.join(BASELINES)}."}
    )
    ask: bool = field(default=True, metadata={"help": "Whether the frozen model answers."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at."})
    port: int | None = field(default=None, metadata={"help": "Its port; default: the first free one from 7860 on."})
    share: bool = field(default=False, metadata={"help": "Whether to tunnel the page to a public address."})

    def __post_init__(self) -> None:
        named = {"sft": self.sft, "grpo": self.grpo}
        self.selectors = [f"{name}={path}" for name, path in named.items() if path is not None] or self.selectors
        super().__post_init__()
        if self.port is not None and not 0 < self.port < 65536:
            raise ValueError(f"port={self.port} must be from 1 to 65535.")


def parse_demo(arguments: Sequence[str]) -> DemoArguments:
    """
    Arguments of `--config FILE` (YAML), and on top of it those of the command line.

    Raises:
        ValueError: for a key that no argument has.
    """
    (parsed,) = parse_dataclasses([DemoArguments], arguments, prog="lever-grpo demo")
    return parsed
