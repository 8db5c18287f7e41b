"""From a public checkpoint to a folder that `AutoModel.from_pretrained` reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModel

from ..atomic import refuse_links
from ..models import SelectorConfig
from .checkpoint_files import Checkpoint, read_checkpoint, shorten
from .lever_lm import EMBEDDINGS, convert_lever_lm
from .lever_plus import convert_lever_plus, lever_plus_version


OPTIONS = {
    "Lever-LM": ("num_attention_heads", "query_features", "candidate_features", "max_shots"),
    "Lever-Plus": ("num_attention_heads", "logit_temperature"),
}
EMBEDDINGS_FILE = "embeddings.safetensors"
FILES = ("config.json", "model.safetensors", EMBEDDINGS_FILE)
ENCODERS = {  # parts of the public models that make embeddings of rows: they come before a selector
    "img_model.": "CLIP's image encoder",
    "sen_model.": "CLIP's text encoder",
    "img_adapter.": "the trained layer behind the image encoder",
    "sen_adapter.": "the trained layer behind the text encoder",
}


@dataclass(frozen=True)
class Conversion:
    """
    What [`convert_checkpoint`] did.

    Args:
        family (`str`):
            What the checkpoint was recognised as.
        config ([`SelectorConfig`]):
            Of the selector that was written.
        num_weights (`int`):
            Its number of weights.
        embeddings (`dict[str, tuple[int, ...]]`):
            Names and shapes of what went into `embeddings.safetensors`.
        assumed (`list[str]`):
            What the checkpoint does not say, as it was taken.
        left_out (`list[str]`):
            What is in the checkpoint and no part of a selector.
    """

    family: str
    config: SelectorConfig
    num_weights: int
    embeddings: dict[str, tuple[int, ...]] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        widths = [f"{name} {width}" for name, width in self.config.candidate_features.items()]
        lines = [
            f"recognised: {self.family}",
            f"selector: {self.config.model_type}, embeddings: {', '.join(widths)}, {self.num_weights:,} weights",
            *(f"{EMBEDDINGS_FILE}: {name}, {' x '.join(map(str, shape))}" for name, shape in self.embeddings.items()),
            *(f"assumed, as the checkpoint does not say: {what}" for what in self.assumed),
            *(f"left out: {what}" for what in self.left_out),
        ]
        return "\n".join(lines)


def convert_checkpoint(path: str | Path, output_dir: str | Path, **options: Any) -> Conversion:
    """
    Writes a public Lever-LM or Lever-Plus checkpoint as a selector of this package.

    The file is read without running anything in it; the names of its tensors tell what it is.

    Args:
        path (`str` or `Path`):
            The checkpoint; see [`read_checkpoint`].
        output_dir (`str` or `Path`):
            Folder to write: `config.json`, `model.safetensors` and, for Lever-LM, `embeddings.safetensors`. Other
            files in it stay.
        **options:
            What the tensors do not tell: of [`convert_lever_lm`] or [`convert_lever_plus`]. `None` counts as not
            given.

    Returns:
        [`Conversion`]: What was recognised, assumed and left out.

    Raises:
        ValueError: if the file cannot be read safely, is of another model or does not fit the options, or `output_dir`
            holds a model.
        FileNotFoundError: if there is no such file.
    """
    folder = Path(output_dir)
    refuse_links(folder / name for name in FILES)
    earlier = [name for name in FILES if (folder / name).exists()]
    if earlier:
        raise ValueError(
            f"output_dir={str(output_dir)!r} holds a model ({', '.join(earlier)}); delete it or name another folder."
        )
    checkpoint = read_checkpoint(path)
    try:
        conversion, weights, embeddings = _converted(checkpoint, {k: v for k, v in options.items() if v is not None})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model = AutoModel.from_config(conversion.config)
    model.load_state_dict(weights)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=folder) as temporary:
        model.save_pretrained(temporary)
        if embeddings:
            save_file(embeddings, Path(temporary, EMBEDDINGS_FILE))
        # config.json comes last: without it the folder is no model
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == FILES[0]):
            os.replace(file, folder / file.name)
    return conversion


def _converted(
    checkpoint: Checkpoint, options: dict[str, Any]
) -> tuple[Conversion, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What was done, the weights, and the embeddings of candidates."""
    tensors = {name: x for name, x in checkpoint.tensors.items() if not name.startswith(tuple(ENCODERS))}
    version = lever_plus_version(tensors)
    if EMBEDDINGS not in tensors and version is None:
        raise ValueError(
            f"its tensors ({shorten(checkpoint.tensors)}) are of no selector that is known. Lever-LM has "
            f"{EMBEDDINGS}, Lever-Plus v1 query_proj.0.weight, v2 and v3 query_proj.weight with "
            "cross_attn.in_proj_weight or cross_attn_layers.0.in_proj_weight."
        )
    family = "Lever-LM" if version is None else "Lever-Plus"
    for name, value in options.items():
        if name not in OPTIONS[family]:
            raise ValueError(f"{name}={value!r} is no option of {family}, which this is; leave it out.")
    config: SelectorConfig
    embeddings: dict[str, torch.Tensor] = {}
    if version is None:
        config, weights, embeddings = convert_lever_lm(checkpoint.tensors, **options)
        taken = {
            "num_attention_heads": config.num_attention_heads,
            "query_features": " ".join(config.query_features),
            "candidate_features": " ".join(list(config.candidate_features)[1:]) or "none",
        }
        assumed = [f"{name} {value} (--{name})" for name, value in taken.items() if name not in options]
    else:
        config, weights, assumed = convert_lever_plus(tensors, checkpoint.settings, **options)
    conversion = Conversion(
        family=family if version is None else f"{family} {version}",
        config=config,
        num_weights=sum(x.numel() for x in weights.values()),
        embeddings={name: tuple(x.shape) for name, x in embeddings.items()},
        assumed=assumed,
        left_out=_left_out([name for name in checkpoint.tensors if name not in tensors]),
    )
    return conversion, weights, embeddings


def _left_out(names: Sequence[str]) -> list[str]:
    lines = []
    for prefix, what in ENCODERS.items():
        own = [name for name in names if name.startswith(prefix)]
        if own:
            trained = ", with LoRA" if any("lora_" in name for name in own) else ""
            lines.append(f"{what}{trained} ({prefix}*, {len(own)} tensors); embeddings must come from it")
    return lines
