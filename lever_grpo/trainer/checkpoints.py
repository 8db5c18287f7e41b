"""Checkpoints on disk: what ours hold beside the base class's files, and which of them are whole."""

import json
import logging
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)
MEMORY_NAME = "training_memory.json"
# names that optimisers and weights go by: on one device and with DDP, with FSDP, with DeepSpeed
_WEIGHTS = ("model*.safetensors", "adapter_model*", "pytorch_model*", "global_step*")
_OPTIMIZER = ("optimizer*", "global_step*")


def save_memory(memory: dict[str, Any], folder: str | os.PathLike) -> None:
    """Writes what training remembers to a checkpoint."""
    Path(folder, MEMORY_NAME).write_text(json.dumps(memory, indent=2) + "\n", encoding="utf-8")


def load_memory(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads it back.

    Raises:
        FileNotFoundError: if the checkpoint holds weights alone.
    """
    if not Path(folder, MEMORY_NAME).exists():
        raise FileNotFoundError(
            f"{folder} has no {MEMORY_NAME}, so that training cannot go on from it: with save_only_model=True "
            "checkpoints hold weights alone. Start a new training from it as the model."
        )
    return json.loads(Path(folder, MEMORY_NAME).read_text(encoding="utf-8"))


def last_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The latest whole checkpoint in a trainer's folder, `None` where there is none.

    One whose writing was cut off, or that lost a file or the end of one since, is passed over with a warning.

    Example:

    ```python
    >>> import tempfile
    >>> from lever_grpo.trainer import last_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(last_checkpoint(folder))
    None

    ```
    """
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(found, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        damage = find_damage(path)
        if damage is None:
            return str(path)
        logger.warning("%s is not whole (%s): an earlier checkpoint is used", path, damage)
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is missing or cut off in a checkpoint, as far as can be told without loading tensors; `None` if nothing."""
    for name in (TRAINER_STATE_NAME, MEMORY_NAME):
        try:
            json.loads((checkpoint / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return f"no readable {name}"
    for what, patterns in (("weights", _WEIGHTS), ("optimizer", _OPTIMIZER), ("random states", ("rng_state*",))):
        if not any(_glob(checkpoint, patterns)):
            return f"no {what}"
    for path in checkpoint.glob("*.safetensors"):
        if not _whole_safetensors(path):
            return f"{path.name} is cut off"
    for path in _glob(checkpoint, ("*.pt", "*.pth")):
        if not zipfile.is_zipfile(path):  # its directory stands at the end of the file
            return f"{path.name} is cut off"
    return None


def _glob(folder: Path, patterns: Iterable[str]) -> Iterable[Path]:
    return (path for pattern in patterns for path in folder.glob(pattern))


def _whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says: 8 bytes of length, the header, the tensors."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 2 <= length <= size - 8:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"]
    return size == 8 + length + max(ends, default=0)
