"""The tensors of a checkpoint that another program wrote; nothing in the file is ever run."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


STATE_DICTS = ("state_dict", "model_state_dict", "model")  # where trainers put a model's tensors
SETTINGS = "model_config"  # where Lever-Plus's post-training puts the model's options
# of Lightning modules, of wrappers, and of the parts of Lever-LM and Lever-Plus that hold the selector
PREFIXES = ("module.", "_orig_mod.", "model.", "lever_lm.", "pointer_selector.")
SHOWN = 6


@dataclass(frozen=True)
class Checkpoint:
    """
    What a checkpoint holds.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            By their names, less the prefixes of what was wrapped around the selector.
        settings (`dict[str, Any]`):
            The model's options, where the file has them beside the tensors.
    """

    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """
    Reads a `.safetensors` file or one that `torch.save` wrote (`.ckpt`, `.pt`, `.pth`), of tensors and plain values.

    Args:
        path (`str` or `Path`):
            The file: tensors by name, or a dict that has such a dict as `state_dict`, `model_state_dict` or `model`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is broken, holds objects that only running code could restore, or no tensors by name.

    Example:

    ```python
    >>> import tempfile
    >>> import torch
    >>> from lever_grpo.convert import read_checkpoint
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"state_dict": {"lever_lm.bias": torch.zeros(3)}, "epoch": 4}, f"{folder}/last.ckpt")
    ...     read_checkpoint(f"{folder}/last.ckpt").tensors
    {'bias': tensor([0., 0., 0.])}

    ```
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected a checkpoint file, found {'a folder' if path.is_dir() else 'none'}."
        )
    content = _load(path)
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected tensors by name.")
    named = next((content[key] for key in STATE_DICTS if isinstance(content.get(key), Mapping)), content)
    others = [name for name, value in named.items() if not isinstance(value, torch.Tensor)]
    if others or not named:
        raise ValueError(
            f"{path}: expected tensors by name, at the top or as {', '.join(STATE_DICTS)}; found "
            f"{'other values: ' + shorten(others) if others else 'nothing'}."
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        stripped = strip_prefixes(str(name))
        if stripped in tensors:
            raise ValueError(f"{path} has two tensors named {stripped!r} behind different prefixes; keep one of them.")
        tensors[stripped] = tensor
    settings = content.get(SETTINGS)
    return Checkpoint(tensors, dict(settings) if isinstance(settings, Mapping) else {})


def strip_prefixes(name: str) -> str:
    """
    A tensor's name within the selector.

    Example:

    ```python
    >>> from lever_grpo.convert.checkpoint_files import strip_prefixes
    >>> strip_prefixes("lever_lm.pointer_selector.query_proj.weight")
    'query_proj.weight'

    ```
    """
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(found)
    return name


def shorten(names: Iterable[object]) -> str:
    """The first few names, and how many more there are."""
    shown = [str(name) for name in names]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        held = f"an object of {found[1]}" if found else "more than tensors and plain values"
        raise ValueError(
            f"{path} holds {held} (or is damaged), and restoring it would run code that the file names: it was not "
            "read. Someone who trusts it can load it and save its tensors alone, by "
            "torch.save({'state_dict': checkpoint['state_dict']}, 'weights.pt')."
        ) from error
    except Exception as error:  # of a damaged file, any: KeyError, EOFError, RuntimeError, SafetensorError …
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is no checkpoint, or a damaged one ({type(error).__name__}: {reason}); copy it again."
        ) from error
