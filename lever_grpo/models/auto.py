"""Which kinds of selectors there are: by the name of a version, and by what a checkpoint says it is."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModel

from .configuration_selector import SelectorConfig
from .modeling_clip_selector import ClipSelector
from .modeling_gpt2_selector import GPT2Selector
from .modeling_lever_plus import LeverPlusSelector
from .modeling_pointer_selector import PointerSelector
from .modeling_selector import SelectorModel


SELECTORS: tuple[type[SelectorModel], ...] = (GPT2Selector, PointerSelector, LeverPlusSelector, ClipSelector)
PRESETS = {preset: kind for kind in SELECTORS for preset in kind.config_class.presets}


def config_from_preset(preset: str, **kwargs: Any) -> SelectorConfig:
    """
    The configuration of a named version, of whatever kind it is.

    Args:
        preset (`str`):
            A name in `PRESETS`.
        **kwargs:
            Arguments of its configuration, on top of the preset's.

    Raises:
        ValueError: if the name is unknown, or an argument does not fit.

    Example:

    ```python
    >>> from lever_grpo.models import config_from_preset
    >>> config_from_preset("v1", embed_dim=384).encoder
    'bi_encoder'

    ```
    """
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is unknown; the presets are {', '.join(PRESETS)}.")
    return PRESETS[preset].config_class.from_preset(preset, **kwargs)


def load_selector(path: str | Path, **kwargs: Any) -> SelectorModel:
    """
    Loads a selector of any kind.

    Args:
        path (`str` or `Path`):
            A local folder, or the id of one on the Hub.
        **kwargs:
            Passed to `from_pretrained`.

    Code of a checkpoint is never run: it comes from safetensors, without modules of its own or kernels of the Hub.

    Raises:
        OSError: if there is no such checkpoint, or its `config.json` is no JSON.
        ValueError: if the checkpoint is of another kind of model or damaged, or weights are missing or not finite.
    """
    kwargs = {"use_safetensors": True, **kwargs, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(path, **kwargs)
        if not isinstance(config, SelectorConfig):
            raise ValueError(f"model_type={config.model_type!r} is no selector; give a checkpoint of a selector.")
        if "/" in str(config._attn_implementation):  # a repository of kernels, which are code
            raise ValueError(
                f"attn_implementation={config._attn_implementation!r} is code of the Hub; take it out of config.json."
            )
        selector, found = AutoModel.from_pretrained(path, config=config, output_loading_info=True, **kwargs)
    except (OSError, ImportError):
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # of a damaged one, any: TypeError, RuntimeError, SafetensorError …
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} is no selector, or a damaged one ({type(error).__name__}: {reason}); copy it again."
        ) from error
    if found["missing_keys"]:
        raise ValueError(
            f"{path}: its weights lack {sorted(found['missing_keys'])[:5]}, which config.json asks for; do the two "
            "files belong together?"
        )
    broken = [name for name, weights in selector.named_parameters() if not weights.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: the weights {broken[:5]} hold NaN or infinity; take an earlier checkpoint.")
    return selector
