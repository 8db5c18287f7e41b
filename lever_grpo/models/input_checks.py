"""Checks of what a selector is given: a wrong shape could broadcast, or be cut, without an error."""

from torch import Tensor

from .configuration_selector import SelectorConfig


def check_pools(
    config: SelectorConfig,
    query_embeds: Tensor,
    candidate_embeds: Tensor,
    candidate_mask: Tensor | None,
    candidate_indices: Tensor | None,
) -> None:
    """Raises `ValueError` where queries and pools do not fit each other or the config."""
    widths = (sum(config.query_features.values()), sum(config.candidate_features.values()))
    if query_embeds.dim() != 2 or query_embeds.shape[1] != widths[0]:
        raise ValueError(
            f"query_embeds has shape {tuple(query_embeds.shape)}, expected (B, {widths[0]}) for the features "
            f"{config.query_features}."
        )
    if candidate_embeds.dim() not in (2, 3) or candidate_embeds.shape[-1] != widths[1]:
        raise ValueError(
            f"candidate_embeds has shape {tuple(candidate_embeds.shape)}, expected (B, K, {widths[1]}) or "
            f"(U, {widths[1]}) for the features {config.candidate_features}."
        )
    batch = query_embeds.shape[0]
    if candidate_embeds.dim() == 3 and candidate_indices is not None:
        raise ValueError("candidate_indices needs shared candidates: give candidate_embeds as (U, D).")
    if candidate_embeds.dim() == 3 and candidate_embeds.shape[0] != batch:
        raise ValueError(
            f"candidate_embeds has {candidate_embeds.shape[0]} pools for {batch} queries; give one pool per query, "
            "or shared candidates as (U, D)."
        )
    if candidate_indices is not None and (candidate_indices.dim() != 2 or candidate_indices.shape[0] != batch):
        raise ValueError(
            f"candidate_indices has shape {tuple(candidate_indices.shape)}, expected ({batch}, K): one pool per query."
        )
    pool = candidate_embeds.shape[-2] if candidate_indices is None else candidate_indices.shape[1]
    if candidate_mask is not None and tuple(candidate_mask.shape) != (batch, pool):
        raise ValueError(f"candidate_mask has shape {tuple(candidate_mask.shape)}, expected {(batch, pool)}.")


def check_sequences(query_embeds: Tensor, sequences: Tensor, sequence_mask: Tensor | None) -> None:
    """Raises `ValueError` where sequences and their mask do not fit each other or the queries."""
    batch = query_embeds.shape[0]
    if sequences.dim() != 3 or sequences.shape[0] != batch:
        raise ValueError(f"sequences has shape {tuple(sequences.shape)}, expected ({batch}, G, S): a group per query.")
    if sequence_mask is not None and sequence_mask.shape != sequences.shape:
        raise ValueError(
            f"sequence_mask has shape {tuple(sequence_mask.shape)}, expected that of sequences, "
            f"{tuple(sequences.shape)}."
        )


def check_temperature(temperature: float) -> None:
    """Raises `ValueError` unless `temperature` is above 0."""
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0; to pick the best, decode without sampling.")
