"""Search order and prompt order, and what the name of a Lever-LM file says.

The two orders are easily mixed up. **Search order** is the order in which a search (or a policy) picks
demonstrations, first pick first; it is the only one that is stored. **Prompt order** is the order in which they stand
in the prompt, and follows from it: with `construct_order="left"` a new demonstration is put before the others, so the
prompt is the reversed search order; with `"right"` it is put after them, and the two are the same. Lever-LM *files*
hold the reversed search order in both cases, because the search prepends to its id list whatever the prompt does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


_FILE_NAME = re.compile(
    r"^(?P<task>[^-]+)-(?P<dataset>[^-]+)-(?P<model>.+)-(?P<sampler>[^-]+)-scorer[:_](?P<scorer>[^-]+)"
    r"-construct_order[:_](?P<construct_order>left|right)-beam_size[:_](?P<beam_size>\d+)"
    r"-(?P<shots_key>few_shot|max_shot)[:_](?P<shots>\d+)-candidate_num[:_](?P<candidate_num>\d+)"
    r"-sample_num[:_](?P<sample_num>\d+)\.json[l]?(\.gz)?$"
)


def to_search_order(prompt_order: Sequence[int], construct_order: str = "left") -> list[int]:
    """Order of picking from the order in the prompt. The two conversions undo each other.

    Example:

    ```python
    >>> from lever_grpo.data import to_search_order
    >>> to_search_order([8, 5], construct_order="left"), to_search_order([8, 5], construct_order="right")
    ([5, 8], [8, 5])

    ```
    """
    _check_construct_order(construct_order)
    return list(prompt_order)[::-1] if construct_order == "left" else list(prompt_order)


def to_prompt_order(search_order: Sequence[int], construct_order: str = "left") -> list[int]:
    """Order in the prompt from the order of picking.

    Example:

    ```python
    >>> from lever_grpo.data import to_prompt_order
    >>> to_prompt_order([5, 8])  # 5 was found first, 8 was put before it
    [8, 5]

    ```
    """
    return to_search_order(search_order, construct_order)


def _check_construct_order(construct_order: str) -> None:
    if construct_order not in ("left", "right"):
        raise ValueError(f"construct_order must be 'left' or 'right', got {construct_order!r}")


def parse_log_name(path: str | Path) -> dict[str, Any]:
    """Settings that a Lever-LM file name carries, or an empty dict for any other name.

    Example:

    ```python
    >>> from lever_grpo.data import parse_log_name
    >>> name = (
    ...     "vqa-okvqa-flamingo_3B-RandSampler-scorer:infoscore-construct_order:left-beam_size:5-few_shot:2"
    ...     "-candidate_num:64-sample_num:800.json"
    ... )
    >>> settings = parse_log_name(name)
    >>> settings["construct_order"], settings["few_shot"], settings["candidate_num"]
    ('left', 2, 64)
    >>> parse_log_name("anything_else.json")
    {}

    ```
    """
    match = _FILE_NAME.match(Path(path).name)
    if match is None:
        return {}
    settings: dict[str, Any] = match.groupdict()
    settings[settings.pop("shots_key")] = int(settings.pop("shots"))
    for name in ("beam_size", "candidate_num", "sample_num"):
        settings[name] = int(settings[name])
    return settings
