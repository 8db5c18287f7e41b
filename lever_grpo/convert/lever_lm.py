"""Public Lever-LM checkpoints: the layout of `GPT2LeverLM`'s tensors, and ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import torch

from ..models import GPT2Selector, GPT2SelectorConfig
from .checkpoint_files import shorten, strip_prefixes


logger = logging.getLogger(__name__)
GPT2 = "lm_model.transformer."
EMBEDDINGS = "lm_model.transformer.wte.weight"
HEAD = "lm_model.lm_head.weight"
ENCODERS = {"image": "img_model.", "text": "sen_model."}
ADAPTERS = ("img_adapter.", "sen_adapter.")
CAUSAL_MASK = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # older versions of GPT-2 saved it


def convert_lever_lm(
    tensors: Mapping[str, torch.Tensor],
    query_features: Sequence[str] = ("image", "text"),
    candidate_features: Sequence[str] = (),
    num_attention_heads: int = 8,
    max_shots: int = 8,
) -> tuple[GPT2SelectorConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """
    Configuration and weights of the [`GPT2Selector`] that gives the numbers of a Lever-LM (Yang et al., 2024).

    The original knows candidates by their ids. Here the embedding of an id is a feature of its candidate, `"token"`:
    store the returned embeddings, row i for candidate i, beside the others. CLIP's embeddings of queries and of
    candidates are read as the original adds them to GPT-2's inputs: at unit length if it was trained with `norm=True`,
    otherwise as CLIP gives them.

    The numbers are those of the original for one query at a time, with all candidates as the pool; decoding a batch,
    it refuses to each query what the others have picked. As in its decoding, the end is never chosen. Without
    `reverse_seq`, its picks stand in the prompt in the order of picking: `construct_order="right"`.

    Args:
        tensors (`Mapping[str, torch.Tensor]`):
            Those of the model, or of the Lightning module around it.
        query_features (`Sequence[str]`, *optional*, defaults to `("image", "text")`):
            The model's `query_encoding_flag`: `"image"`, `"text"` or both, in the order of `query_embeds`.
        candidate_features (`Sequence[str]`, *optional*, defaults to `()`):
            The model's `icd_encoding_flag`; in `candidate_embeds` they come behind `"token"`.
        num_attention_heads (`int`, *optional*, defaults to `8`):
            The model's `n_head`, of which the tensors say nothing.
        max_shots (`int`, *optional*, defaults to `8`):
            The longest sequence that the selector will be asked for.

    Returns:
        `tuple`: The configuration, the weights, and the embeddings to store, `{"token": (N, H)}`.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, or contradict the features; and for adapters,
            which are no linear maps.
    """
    tensors = {strip_prefixes(name): tensor for name, tensor in tensors.items()}
    embeddings = tensors.get(EMBEDDINGS)
    if embeddings is None:
        raise ValueError(
            f"expected the tensors of a GPT2LeverLM with {EMBEDDINGS!r}, found {shorten(tensors) or 'none'}."
        )
    if embeddings.dim() != 2 or len(embeddings) < 4:
        raise ValueError(
            f"{EMBEDDINGS} has shape {tuple(embeddings.shape)}; expected a row for each candidate and 3 more: "
            "the end, the beginning and the query."
        )
    if HEAD in tensors and not torch.equal(tensors[HEAD], embeddings):
        raise ValueError(f"{HEAD} differs from {EMBEDDINGS}, and in a GPT2LeverLM the two are one matrix.")
    _check_features(tensors, query_features, candidate_features)
    _check_names(tensors)

    width = embeddings.shape[1]
    gpt2 = {
        name.removeprefix(GPT2): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith(GPT2) and not CAUSAL_MASK.fullmatch(name.removeprefix(GPT2))
    }
    config = GPT2SelectorConfig(
        query_features=dict.fromkeys(query_features, width),
        candidate_features=dict.fromkeys(["token", *candidate_features], width),
        hidden_dim=width,
        num_layers=max(1, len({name.split(".")[1] for name in gpt2 if name.startswith("h.")})),
        num_attention_heads=num_attention_heads,
        scale_logits=False,
        max_shots=max_shots,
    )
    _check_shapes(gpt2, config)
    encoders = [name for name in tensors if name.startswith(tuple(ENCODERS.values()))]
    if encoders:
        logger.warning(
            "left out %d tensors of CLIP (%s): embeddings must come from the CLIP that the model was trained with, "
            "which is the public one unless it was trained along.",
            len(encoders),
            shorten(encoders),
        )
    identity = torch.eye(width)
    weights = {
        "query_proj.weight": identity.repeat(1, len(query_features)),
        "query_proj.bias": torch.zeros(width),
        "candidate_in.weight": identity.repeat(1, 1 + len(candidate_features)),
        "candidate_out.weight": torch.eye(width, width * (1 + len(candidate_features))),  # the token's part alone
        **{f"gpt2.{name}": tensor for name, tensor in gpt2.items()},
        "gpt2.wte.weight": gpt2["wte.weight"][-2:].clone(),  # the beginning and the query
        "gpt2.wpe.weight": gpt2["wpe.weight"][: max_shots + 2].clone(),
    }
    return config, weights, {"token": gpt2["wte.weight"][:-3].clone()}


def _check_features(
    tensors: Mapping[str, torch.Tensor], query_features: Sequence[str], candidate_features: Sequence[str]
) -> None:
    for argument, names in (("query_features", query_features), ("candidate_features", candidate_features)):
        if isinstance(names, str) or not set(names) <= set(ENCODERS) or len(set(names)) < len(names):
            raise ValueError(f"{argument}={names!r}: must be a list of {', '.join(ENCODERS)}, each at most once.")
    if not query_features:
        raise ValueError("query_features is empty: a Lever-LM that reads nothing of the query is not converted.")
    held = {feature for feature, prefix in ENCODERS.items() if any(name.startswith(prefix) for name in tensors)}
    read = {*query_features, *candidate_features}
    if held and held != read:  # encoders that did not change may have been left out of the file, all of them
        feature = sorted(held ^ read)[0]
        has, named = ("an", "neither names it") if feature in held else ("no", "one of them names it")
        raise ValueError(
            f"query_features={list(query_features)}, candidate_features={list(candidate_features)}: the checkpoint "
            f"has {has} encoder {ENCODERS[feature]!r} of {feature!r}, and {named}; give the model's own flags."
        )


def _check_names(tensors: Mapping[str, torch.Tensor]) -> None:
    adapters = [name for name in tensors if name.startswith(ADAPTERS)]
    if adapters:
        raise ValueError(
            f"the checkpoint has adapters ({shorten(adapters)}), and a selector's projections of embeddings are "
            "linear; pass CLIP's embeddings through the adapters, store what comes out as the embeddings, and convert "
            "the checkpoint without these tensors."
        )
    known = (GPT2, HEAD, *ENCODERS.values())
    unknown = [name for name in tensors if not name.startswith(known)]
    if unknown:
        raise ValueError(f"a GPT2LeverLM has no {shorten(unknown)}; give its checkpoint.")


def _check_shapes(gpt2: Mapping[str, torch.Tensor], config: GPT2SelectorConfig) -> None:
    """That these are the tensors of a selector's GPT-2, but for the numbers of embeddings and of positions."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in GPT2Selector(config).gpt2.state_dict().items()}
    missing = [f"{GPT2}{name}" for name in expected if name not in gpt2]
    if missing:
        raise ValueError(f"the checkpoint lacks {shorten(missing)}; a GPT2LeverLM has them.")
    unknown = [f"{GPT2}{name}" for name in gpt2 if name not in expected]
    if unknown:
        raise ValueError(f"a GPT2LeverLM has no {shorten(unknown)}; give its checkpoint.")
    for name, shape in expected.items():
        compared = slice(1 if name in ("wte.weight", "wpe.weight") else 0, None)  # how many rows is the model's own
        found = gpt2[name].shape
        if len(found) != len(shape) or found[compared] != shape[compared]:
            raise ValueError(
                f"{GPT2}{name} has shape {tuple(found)}, and in a GPT2LeverLM of its width {tuple(shape)}."
            )
    rows = len(gpt2["wpe.weight"])
    if rows < config.max_shots + 2:
        raise ValueError(
            f"max_shots={config.max_shots}, but the model has {rows} positions, two of them for the beginning and the "
            f"query; max_shots is at most {rows - 2}."
        )
