"""Arguments from YAML and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl import TrlParser


def parse_dataclasses(classes: Sequence[Any], arguments: Sequence[str], prog: str | None = None) -> tuple[Any, ...]:
    """
    Instances of data classes from `--config FILE` (YAML), and on top of it the command line.

    Raises:
        ValueError: for a key that no class has.
    """
    # the parser knows `--config FILE` but not `--config=FILE`
    parts = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    return TrlParser(list(classes), prog=prog).parse_args_and_config(parts, fail_with_unknown_args=True)
