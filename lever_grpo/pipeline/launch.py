"""Commands in several processes, started by accelerate's own launcher."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import read_config


PACKAGE = Path(__file__).resolve().parents[1]
# in a wheel they are inside the package, in a checkout beside it
CONFIGS = next((f for f in (PACKAGE, PACKAGE.parent) if (f / "accelerate_configs").is_dir()), PACKAGE)
NO_LAUNCH = "none"
ONE_PROCESS = ("NO", "MULTI_CPU")  # distributed types with which accelerate starts one, whatever is asked for


@dataclass
class CommandArguments:
    r"""
    What `lever-grpo train`, `generate` and `evaluate` are told about the run itself.

    Args:
        accelerate_config (`str`, *optional*):
            Run in the processes of this accelerate config: a name of the packaged ones (`"multi_gpu"`, …) or a file.
            Without one, or with `"none"`, the command runs in its own process.
        num_processes (`int`, *optional*):
            How many, instead of what the config says.
        json (`bool`, *optional*, defaults to `False`):
            Whether the standard output holds the result as JSON, and nothing else.
    """

    accelerate_config: str | None = field(
        default=None, metadata={"help": "Run in the processes of this accelerate config: a packaged name, or a file."}
    )
    num_processes: int | None = field(default=None, metadata={"help": "How many, instead of what the config says."})
    json: bool = field(default=False, metadata={"help": "Print the result as JSON, and nothing else."})

    def __post_init__(self) -> None:
        if self.num_processes is not None and self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1.")
        if self.num_processes is not None and self.accelerate_config is None:
            raise ValueError(
                f"num_processes={self.num_processes} is of an accelerate config; name one by accelerate_config, of "
                f"{', '.join(packaged_configs())}."
            )

    @property
    def launches(self) -> bool:
        """Whether the command runs in processes of their own."""
        return self.accelerate_config not in (None, NO_LAUNCH)


def packaged_configs() -> dict[str, Path]:
    """
    The accelerate configs that come with the package, by name.

    Example:

    ```python
    >>> from lever_grpo.pipeline.launch import packaged_configs
    >>> list(packaged_configs())
    ['cpu', 'deepspeed_zero2', 'fsdp2', 'multi_gpu', 'single_gpu']

    ```
    """
    return {path.stem: path for path in sorted((CONFIGS / "accelerate_configs").glob("*.yaml"))}


def launch(command: str, arguments: Sequence[str], options: CommandArguments) -> int:
    """
    Runs a command of `lever-grpo` in the processes of `options.accelerate_config`, as `accelerate launch` does.

    Args:
        command (`str`):
            Its name.
        arguments (`Sequence[str]`):
            Its arguments.
        options ([`CommandArguments`]):
            What was read from them.

    Returns:
        `int`: the exit code: that of the process that failed first, or 0.

    Raises:
        ValueError: for a config that is none, and for processes that accelerate would not start.
    """
    # not above: to import the launcher is to set up logging, for all
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    name = str(options.accelerate_config)
    path = packaged_configs().get(name, Path(name))
    if not path.is_file():
        raise ValueError(f"accelerate_config={name!r} is no file, and none of {', '.join(packaged_configs())}.")
    read_config(path)  # a mapping, or an error that says where
    try:
        config = load_config_from_file(str(path))
    except ValueError as error:
        raise ValueError(f"accelerate_config={name!r} is no config of accelerate: {error}") from error
    if isinstance(config, ClusterConfig) and config.distributed_type in ONE_PROCESS and not config.mpirun_config:
        processes = options.num_processes or config.num_processes
        if processes > 1:
            raise ValueError(
                f"num_processes={processes} with accelerate_config={name!r}, which starts one process; for several on "
                "the CPU take 'multi_gpu' with use_cpu (train) or device='cpu' (generate, evaluate)."
            )
    count = [] if options.num_processes is None else ["--num_processes", str(options.num_processes)]
    # the last one counts, so that the processes do not launch again
    inner = [command, *arguments, "--accelerate_config", NO_LAUNCH]
    try:
        launch_command(
            launch_command_parser().parse_args(
                ["--config_file", str(path), *count, "--module", "lever_grpo.cli", *inner]
            )
        )
    except subprocess.CalledProcessError as error:
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = -error.sigval
    else:
        code = 0
    return code if code >= 0 else 128 - code  # killed by a signal: as shells count
