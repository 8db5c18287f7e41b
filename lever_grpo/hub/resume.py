"""A run that was cut off, back from the Hub: its checkpoints where `--resume_from_checkpoint` finds them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..atomic import LOCK_FILE


# where a push with hub_strategy="checkpoint" puts them
LAST, BEST = "last-checkpoint", "best-checkpoint"


def fetch_run(
    repo_id: str,
    output_dir: str | os.PathLike,
    *,
    stage: str = "grpo",
    token: str | bool | None = None,
    revision: str | None = None,
) -> Path:
    """
    Downloads what a run needs to go on: its checkpoints, and the selectors of the stages before.

    Args:
        repo_id (`str`):
            Model repository that a run pushed to with `hub_strategy="checkpoint"` or `"all_checkpoints"`.
        output_dir (`str` or `Path`):
            Folder to write, which is not there yet or empty; it appears whole or not at all.
        stage (`str`, *optional*, defaults to `"grpo"`):
            Whose checkpoints these are: `"grpo"`, or `"sft"` for a run of the supervised stage alone.
        token, revision (`str`, *optional*):
            As in `huggingface_hub.snapshot_download`.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: if the repository holds no checkpoint.
        FileExistsError: if the folder holds something.

    Example:

    ```python
    >>> from lever_grpo.hub import fetch_run
    >>> fetch_run("me/my-selector", "outputs/mine")  # doctest: +SKIP

    ```
    """
    output = Path(output_dir)
    if output.exists() and any(path.name != LOCK_FILE for path in output.iterdir()):
        raise FileExistsError(f"output_dir={str(output)!r} is not empty; name another folder, or resume from it.")
    wanted = [f"{LAST}/*", f"{BEST}/*", f"{PREFIX_CHECKPOINT_DIR}-*/*", "rce/*", "sft/*", "checkpoints/*"]
    there = Path(snapshot_download(repo_id, allow_patterns=wanted, token=token, revision=revision))
    found = sorted(path.parent for path in there.glob(f"*/{TRAINER_STATE_NAME}"))
    if not found:
        raise ValueError(
            f"{repo_id} holds no checkpoint to go on from; push with --hub_strategy checkpoint, or leave "
            "resume_from_hub out."
        )
    steps = {folder: _step_of(folder, repo_id) for folder in found}  # before anything is written
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    checkpoints = partial / "checkpoints" / stage
    for folder, step in steps.items():
        shutil.copytree(folder, checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{step}", dirs_exist_ok=True)
    others = {"rce": checkpoints / "rce", "sft": partial / "sft", "checkpoints": partial / "checkpoints"}
    for name, place in others.items():
        if (there / name).exists():
            shutil.copytree(there / name, place, dirs_exist_ok=True)
    if output.exists():
        (output / LOCK_FILE).unlink(missing_ok=True)  # of a run that was killed before it wrote anything
        output.rmdir()
    os.replace(partial, output)
    return output


def _step_of(checkpoint: Path, repo_id: str) -> int:
    """The step that a checkpoint names. It becomes a folder's name, and a stranger may have written it."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        state = None
    step = state.get("global_step") if isinstance(state, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError(
            f"{repo_id}: {checkpoint.name}/{TRAINER_STATE_NAME}: expected an object whose global_step is a whole "
            f"number from 0 on, found {repr(step)[:60]}; the checkpoint is damaged, or somebody meant harm."
        )
    return step
