"""Public Lever-Plus checkpoints: the layouts of their tensors, and ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..models import LeverPlusSelectorConfig
from .checkpoint_files import shorten


SIDES = {"query_proj": "query_proj", "cand_proj": "candidate_proj"}
TOWER = {0: "up_proj", 1: "up_norm", 4: "down_proj", 5: "down_norm"}  # the places of v1's layers in a Sequential
Table = dict[str, tuple[list[str], tuple[int, ...]]]  # their name: our names of its equal parts, and its shape


def lever_plus_version(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """
    Which Lever-Plus network the tensors are of: `"v1"`, `"v2"` (v3 is v2 after post-training) or `None`.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo.convert import lever_plus_version
    >>> lever_plus_version({"query_proj.0.weight": torch.zeros(2, 2)})
    'v1'

    ```
    """
    if "query_proj.0.weight" in tensors:
        return "v1"
    return "v2" if "query_proj.weight" in tensors and _layers(tensors) else None


def convert_lever_plus(
    tensors: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    num_attention_heads: int | None = None,
    logit_temperature: float | None = None,
) -> tuple[LeverPlusSelectorConfig, dict[str, torch.Tensor], list[str]]:
    """
    Configuration and weights of the [`LeverPlusSelector`] that gives the numbers of a Lever-Plus selector.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Those of the selector alone, by its own names.
        settings (`Mapping[str, Any]`):
            The model's options, as far as the checkpoint has them: `num_heads`, `temperature` and `base_architecture`
            (of the first v3, whose query never changes) are read.
        num_attention_heads (`int`, *optional*):
            Heads of v2's attention, of which the tensors say nothing. By default those of `settings`, else 1.
        logit_temperature (`float`, *optional*):
            What the cosines are divided by, of which the tensors say nothing. By default that of `settings`, else 0.5
            for v1 with a learned update, 0.1 for all others, which are Lever-Plus's own defaults.

    Returns:
        `tuple`: The configuration, the weights, and a sentence for each thing that had to be assumed.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape; the message names them.
    """
    version = lever_plus_version(tensors)
    if version is None:
        raise ValueError(f"expected the tensors of a Lever-Plus selector, found {shorten(tensors)}.")
    layers = _layers(tensors)
    update = "average" if version == "v1" and "base_architecture" not in settings else "none"
    if "query_update_weight" in tensors:
        update = "weighted"
    elif "query_update_gate.weight" in tensors:
        update = "gated"
    first = "query_proj.0.weight" if version == "v1" else "query_proj.weight"
    hidden = _matrix(tensors, first).shape[0]
    reading = "input_proj.weight" if version == "v2" and "input_proj.weight" in tensors else first
    width = _matrix(tensors, reading).shape[1]

    table = _towers(hidden, width) if version == "v1" else _attention(layers, hidden, width)
    if update == "weighted":
        table["query_update_weight"] = ["pick_update.weight"], ()
    elif update == "gated":
        table["query_update_gate.weight"] = ["pick_update.gate.weight"], (hidden, 2 * hidden)
        table["query_update_gate.bias"] = ["pick_update.gate.bias"], (hidden,)
    weights = _renamed(tensors, table, f"Lever-Plus {version}")

    assumed = []
    if version == "v1":
        if num_attention_heads is not None:
            raise ValueError(
                f"num_attention_heads={num_attention_heads}: Lever-Plus v1 has no attention; leave it out."
            )
        heads: float = 1
    elif num_attention_heads is not None:
        heads = num_attention_heads
    elif (known := _number(settings, "num_heads")) is not None:
        heads = known
    else:
        heads = 1
        assumed.append("1 attention head (--num_attention_heads)")
    temperature = _number(settings, "temperature") if logit_temperature is None else logit_temperature
    if temperature is None:
        temperature = 0.5 if (version, update) == ("v1", "weighted") else 0.1
        assumed.append(f"temperature {temperature} (--logit_temperature)")
    config = LeverPlusSelectorConfig(
        version=version,
        pick_update=update,
        embed_dim=width,
        hidden_dim=hidden,
        logit_temperature=temperature,
        num_layers=max(1, len(layers)),
        num_attention_heads=int(heads),
    )
    return config, weights, assumed


def _layers(tensors: Mapping[str, torch.Tensor]) -> list[tuple[str, str]]:
    """What the names of v2's attention layers and of their norms begin with, in either layout."""
    if "cross_attn.in_proj_weight" in tensors:
        return [("cross_attn", "attn_norm")]
    found: list[tuple[str, str]] = []
    while f"cross_attn_layers.{len(found)}.in_proj_weight" in tensors:
        found.append((f"cross_attn_layers.{len(found)}", f"attn_norms.{len(found)}"))
    return found


def _towers(hidden: int, width: int) -> Table:
    table: Table = {}
    for theirs, ours in SIDES.items():
        for place, part in TOWER.items():
            shape = {0: (hidden, width), 4: (hidden, hidden)}.get(place, (hidden,))
            table[f"{theirs}.{place}.weight"] = [f"{ours}.{part}.weight"], shape
            table[f"{theirs}.{place}.bias"] = [f"{ours}.{part}.bias"], (hidden,)
    return table


def _attention(layers: list[tuple[str, str]], hidden: int, width: int) -> Table:
    table: Table = {f"{theirs}.weight": ([f"{ours}.weight"], (hidden, hidden)) for theirs, ours in SIDES.items()}
    if width != hidden:
        table["input_proj.weight"] = ["input_proj.weight"], (hidden, width)
    for number, (attention, norm) in enumerate(layers):
        for kind, shape in (("weight", (hidden, hidden)), ("bias", (hidden,))):
            inputs = [f"layers.{number}.{part}_proj.{kind}" for part in "qkv"]  # torch keeps the three in one
            table[f"{attention}.in_proj_{kind}"] = inputs, (3 * hidden, *shape[1:])
            table[f"{attention}.out_proj.{kind}"] = [f"layers.{number}.o_proj.{kind}"], shape
            table[f"{norm}.{kind}"] = [f"layers.{number}.norm.{kind}"], (hidden,)
    return table


def _renamed(tensors: Mapping[str, torch.Tensor], table: Table, what: str) -> dict[str, torch.Tensor]:
    """Our weights, in single precision."""
    missing = [name for name in table if name not in tensors]
    if missing:
        raise ValueError(f"these look like the tensors of {what}, but it also has {shorten(missing)}.")
    unknown = [name for name in tensors if name not in table]
    if unknown:
        raise ValueError(
            f"{what} has no {shorten(unknown)}. Later Lever-Plus versions (V4-2 and on) have other decoders and are "
            "not converted."
        )
    weights: dict[str, torch.Tensor] = {}
    for name, (ours, shape) in table.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}, and in {what} of its width {shape}.")
        parts = torch.atleast_1d(tensors[name].float()).chunk(len(ours))
        weights.update(zip(ours, parts, strict=True))
    return weights


def _matrix(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if tensors[name].dim() != 2:
        raise ValueError(f"{name} has shape {tuple(tensors[name].shape)}; expected a matrix.")
    return tensors[name]


def _number(settings: Mapping[str, Any], name: str) -> float | None:
    value = settings.get(name)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, (int, float)) else None
