"""Greedy decoding that a checkpoint has no say in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria


def generate_greedily(
    model: Any,
    tokenizer: Any,
    inputs: Mapping[str, Tensor],
    max_new_tokens: int,
    stopping_criteria: list[StoppingCriteria] | None = None,
) -> Tensor:
    """
    The tokens that a model puts behind its inputs, (B, T): the most probable one at each step, up to the end token of
    its generation settings (else the tokenizer's). Nothing else of these settings is obeyed.
    """
    theirs = model.generation_config
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_token(tokenizer),
        eos_token_id=tokenizer.eos_token_id if theirs.eos_token_id is None else theirs.eos_token_id,
    )
    # `generate` fills whatever is not set from the model's own: penalties, forbidden tokens, beams, time limits, …
    model.generation_config = GenerationConfig()
    try:
        tokens = model.generate(**inputs, generation_config=greedy, stopping_criteria=stopping_criteria)
    finally:
        model.generation_config = theirs
    return tokens[:, inputs["input_ids"].shape[1] :]


def pad_token(tokenizer: Any) -> int:
    """What fills up the rows of a batch."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in tokens if token is not None)
