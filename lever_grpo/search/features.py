"""How the named embeddings of a task are made of raw rows, written down so that new rows can be embedded alike."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ..atomic import atomic_file
from ..data.examples import Example
from ..scorers.loading import default_model, load_language_model
from .encoders import encode_images, encode_texts


KINDS = ("text", "image", "hidden_states")
ENCODERS_FILE, MAPS_FILE = "encoders.json", "encoders.safetensors"


@dataclass(frozen=True)
class FeatureMap:
    """
    What is done to raw features: standardise each part, bring it to unit length, join the parts, project them.

    Args:
        shift, scale (`np.ndarray` of shape `(P, W)`):
            What is subtracted from the P parts of a row, and what they are then divided by.
        directions (`np.ndarray` of shape `(D, P * W)`, *optional*):
            Rows onto which the joined parts are projected.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.search.features import FeatureMap
    >>> raw = np.random.default_rng(0).standard_normal((50, 1, 8)) + 3
    >>> fitted = FeatureMap.fit(raw, width=4)
    >>> fitted(raw).shape, float(np.linalg.norm(fitted(raw)[0]).round(3))
    ((50, 4), 1.0)

    ```
    """

    shift: NDArray[Any]
    scale: NDArray[Any]
    directions: NDArray[Any] | None = None

    def __call__(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        """Raw features (N, P, W) as rows of unit length, (N, D) or (N, P * W)."""
        joined = self._joined(raw)
        return joined if self.directions is None else unit(joined @ self.directions.T.astype(np.float64))

    def _joined(self, raw: NDArray[Any]) -> NDArray[np.float64]:
        parts = unit((raw.astype(np.float64) - self.shift) / self.scale)
        return unit(parts.reshape(len(parts), -1))

    @classmethod
    def fit(cls, raw: NDArray[Any], width: int | None = None, standardise: bool = False) -> FeatureMap:
        """Centre (and `standardise`) by rows (N, P, W), and keep their `width` leading principal directions."""
        raw = raw.astype(np.float64)
        scale = raw.std(0).clip(min=1e-3) if standardise else np.ones(raw.shape[1:])
        centred = cls(raw.mean(0), scale)
        if width is None:
            return centred
        # not centred again: a projection through the origin keeps cosines, a shift would not
        directions = np.linalg.svd(centred._joined(raw), full_matrices=False)[2][:width]
        largest = directions[np.arange(len(directions)), np.abs(directions).argmax(axis=1)]
        return cls(centred.shift, scale, directions * np.where(largest < 0, -1.0, 1.0)[:, None])


@dataclass(frozen=True)
class FeatureEncoder:
    r"""
    How an embedding is made of a row.

    Args:
        kind (`str`):
            `"text"` ([`encode_texts`]), `"image"` ([`encode_images`]), or `"hidden_states"` of a causal language model
            that reads the text ([`encode_hidden_states`]).
        template (`str`, *optional*, defaults to `"{question}"`):
            The text of a row, of its `{question}` and `{answer}`.
        model, gguf_file, revision (`str`, *optional*):
            Folder or Hub id; by default the packaged encoder of the kind.
        layers (`tuple[int, ...]`, *optional*):
            Of hidden states: the layers, see [`encode_hidden_states`].

    Raises:
        ValueError: for an unknown kind, a text without a row in it, or layers of what has none.

    Example:

    ```python
    >>> from lever_grpo.search.features import FeatureEncoder
    >>> FeatureEncoder("text", "{question} {answer}").of_answer
    True

    ```
    """

    kind: str
    template: str = "{question}"
    model: str | None = None
    gguf_file: str | None = None
    revision: str | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}.")
        if "{question}" not in self.template and "{answer}" not in self.template:
            raise ValueError(f"template={self.template!r} must hold {{question}} or {{answer}}.")
        if (self.layers is not None) != (self.kind == "hidden_states"):
            raise ValueError(f"layers={self.layers} with kind={self.kind!r}: hidden states have layers, others none.")

    @property
    def of_answer(self) -> bool:
        """Whether the embedding needs the row's answer, which only a demonstration has."""
        return self.kind != "image" and "{answer}" in self.template

    def __call__(self, rows: Sequence[Example], device: str | torch.device | None = None) -> NDArray[np.float32]:
        """
        Raw features of rows, (N, P, W); a text or an image has one part, hidden states one a layer.

        Raises:
            ValueError: if a row has no image, and one is wanted.
        """
        if self.kind == "image":
            without = [row.id for row in rows if row.image is None]
            if without:
                raise ValueError(f"rows {without[:5]} have no image, which the selector sees them by.")
            return encode_images([row.image for row in rows], self.model, revision=self.revision, device=device)[
                :, None
            ]
        texts = [_filled(self.template, row) for row in rows]
        if self.kind == "text":
            return encode_texts(texts, self.model, revision=self.revision, device=device)[:, None]
        assert self.layers is not None
        model, gguf_file = (self.model, self.gguf_file) if self.model else default_model()
        return encode_hidden_states(
            texts, self.layers, model, gguf_file=gguf_file, revision=self.revision, device=device
        )


def _filled(template: str, row: Example) -> str:
    # both at once: a question may hold the text "{answer}"
    values = {"question": row.question, "answer": row.answers[0]}
    return re.sub(r"\{(question|answer)\}", lambda found: values[found[1]], template)


def encode_hidden_states(
    texts: Sequence[str],
    layers: Sequence[int],
    model: str,
    *,
    gguf_file: str | None = None,
    revision: str | None = None,
    batch_size: int = 64,
    device: str | torch.device | None = None,
) -> NDArray[np.float32]:
    """
    What a causal language model makes of texts: of each layer but the last one named the mean over the tokens (the
    first left out, an attention sink that is the same in every text), of the last one the last token.

    Args:
        texts (`list[str]`):
            Texts.
        layers (`list[int]`):
            Layers; 0 is the token embeddings.
        model, gguf_file, revision, device:
            The language model, as in [`CausalLMScorer.from_pretrained`]; in float32.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts at a time.

    Returns:
        `np.ndarray` of shape (N, P, H), float32, P the number of layers.
    """
    network, tokenizer, _ = load_language_model(model, gguf_file, revision, "float32", device)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]), padding=True, padding_side="right", return_tensors="pt"
        ).to(network.device)
        with torch.inference_mode():
            states = network.base_model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"].clone()
        last = mask.sum(1) - 1
        mask[:, 0] = (last == 0).to(mask.dtype)  # unless it is the only one
        means = [
            (states[layer] * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True) for layer in list(layers)[:-1]
        ]
        ends = states[layers[-1]][torch.arange(len(last)), last]
        parts.append(torch.stack([*means, ends], dim=1).cpu())
    return torch.cat(parts).numpy()


def unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows (the last axis) of unit length."""
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True).clip(min=1e-12)


def save_encoders(folder: str | Path, encoders: Mapping[str, FeatureEncoder], maps: Mapping[str, FeatureMap]) -> None:
    """Write `encoders.json` and, for those that have a map, `encoders.safetensors` (directions in float16)."""
    folder = Path(folder)
    tensors: dict[str, NDArray[Any]] = {}
    for name, fitted in maps.items():
        tensors |= {f"{name}.{part}": getattr(fitted, part).astype(np.float32) for part in ("shift", "scale")}
        if fitted.directions is not None:
            tensors[f"{name}.directions"] = fitted.directions.astype(np.float16)
    if tensors:
        save_file(tensors, str(folder / MAPS_FILE))
    about = {name: {k: v for k, v in asdict(e).items() if v is not None} for name, e in encoders.items()}
    with atomic_file(folder / ENCODERS_FILE) as stream:
        stream.write((json.dumps(about, indent=2) + "\n").encode())


def load_encoders(folder: str | Path) -> tuple[dict[str, FeatureEncoder], dict[str, FeatureMap]]:
    """
    What [`save_encoders`] wrote; both empty where there is nothing.

    Raises:
        ValueError: for an entry that is no encoder; the message names the file.
    """
    path, tensors = Path(folder, ENCODERS_FILE), Path(folder, MAPS_FILE)
    if not path.exists():
        return {}, {}
    known = {field.name for field in fields(FeatureEncoder)}
    encoders = {}
    try:
        for name, about in json.loads(path.read_text(encoding="utf-8")).items():
            if unknown := set(about) - known:
                raise ValueError(f"{name!r} has the unknown keys {sorted(unknown)}")
            layers = about.get("layers")
            encoders[name] = FeatureEncoder(**{**about, "layers": None if layers is None else tuple(layers)})
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: expected encoders by name of the embedding; {error}.") from error
    try:
        stored = load_file(tensors) if tensors.exists() else {}
        mapped = {name.rpartition(".")[0] for name in stored}
        maps = {
            name: FeatureMap(stored[f"{name}.shift"], stored[f"{name}.scale"], stored.get(f"{name}.directions"))
            for name in mapped
        }
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{tensors}: expected shift and scale of each map, found {error}.") from error
    return encoders, maps
