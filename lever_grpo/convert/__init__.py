"""Public checkpoints of Lever-LM and Lever-Plus as selectors of this package."""

from .checkpoint_files import Checkpoint, read_checkpoint
from .convert import Conversion, convert_checkpoint
from .lever_lm import convert_lever_lm
from .lever_plus import convert_lever_plus, lever_plus_version


__all__ = [
    "Checkpoint",
    "Conversion",
    "convert_checkpoint",
    "convert_lever_lm",
    "convert_lever_plus",
    "lever_plus_version",
    "read_checkpoint",
]
