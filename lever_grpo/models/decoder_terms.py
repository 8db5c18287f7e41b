r"""
Terms that the pointer selector's decoder may add to its logits, in view of what was picked.

A term is a [`DecoderTerm`] with an entry in `TERMS`; `PointerSelectorConfig.decoder_terms` names those that are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .layers import take_rows


if TYPE_CHECKING:
    from .configuration_pointer_selector import PointerSelectorConfig


class DecoderTerm(nn.Module):
    """
    Something added to the logits after the first pick. A term has weights of its own and starts at zero: without
    training it changes nothing.
    """

    def __init__(self, config: PointerSelectorConfig):
        super().__init__()
        # one for each pick after the first; the last serves for longer sequences too
        self.weight = nn.Parameter(torch.empty(max(1, config.max_shots - 1)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets the term to zero, and its own parameters to where they start."""
        init.zeros_(self.weight)

    def encode(self, candidates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """What is computed once per query of its candidates (B, K, H) and first state (B, 1, H): (B, K, …)."""
        raise NotImplementedError

    def gain(self, encoding: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        """(B, G, K): what each candidate would add to what was picked, whose rows of `encoding` are (B, G, t, …)."""
        raise NotImplementedError

    def forward(self, encoding: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        """What to add to the logits (B, G, K) after `picks` (B, G, t), t ≥ 1."""
        count = picks.shape[-1]
        return self.weight[min(count, len(self.weight)) - 1] * self.gain(encoding, take_rows(encoding, picks))


class MMRTerm(DecoderTerm):
    r"""
    Maximal marginal relevance (Carbonell and Goldstein, 1998) with a learned likeness and a learned weight for each
    step: \\( -\lambda_t \max_{j<t} \cos(V a_j, V c) \\). A weight below zero seeks what is alike.
    """

    def __init__(self, config: PointerSelectorConfig):
        super().__init__(config)
        self.view = nn.Linear(config.hidden_dim, config.term_rank, bias=False)

    def encode(self, candidates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.view(candidates), dim=-1)  # (B, K, R)

    def gain(self, encoding: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        likeness = picked @ encoding.transpose(1, 2).unsqueeze(1)  # (B, G, t, K)
        return -likeness.amax(2)


class CoverageTerm(DecoderTerm):
    r"""
    Coverage of learned prototypes p, of which the query says how much it needs each:
    \\( \lambda_t \sum_p n_p(q)\, m_{c,p} \prod_{j<t} (1 - m_{a_j,p}) \\), with memberships
    \\( m \in (0, 1) \\) and needs that sum to 1. What a pick has covered counts no more.
    """

    def __init__(self, config: PointerSelectorConfig):
        super().__init__(config)
        self.prototypes = nn.Linear(config.hidden_dim, config.term_rank)
        self.needs = nn.Linear(config.hidden_dim, config.term_rank)

    def encode(self, candidates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        members = torch.sigmoid(self.prototypes(candidates))  # (B, K, P)
        needed = self.needs(state).softmax(-1) * self.needs.out_features  # (B, 1, P)
        return torch.stack([members, needed.expand_as(members)], dim=-1).flatten(-2)  # (B, K, 2P)

    def gain(self, encoding: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        members, needed = encoding.unflatten(-1, (-1, 2)).unbind(-1)  # (B, K, P)
        uncovered = (1 - picked.unflatten(-1, (-1, 2))[..., 0]).prod(2)  # (B, G, P)
        return (needed[:, :1] * uncovered) @ members.transpose(1, 2)


class DPPTerm(DecoderTerm):
    r"""
    The gain in log-volume of a determinantal point process (Kulesza and Taskar, 2012) with a kernel of low rank:
    \\( \lambda_t \left( \log\det(I + \Phi_{a,c}^\top \Phi_{a,c}) - \log\det(I + \Phi_a^\top \Phi_a) \right) =
    \lambda_t \log\left( 1 + \phi_c^\top (I + \sum_{j<t} \phi_{a_j} \phi_{a_j}^\top)^{-1} \phi_c \right) \\). A
    candidate counts by what the picks *together* do not span.
    """

    def __init__(self, config: PointerSelectorConfig):
        super().__init__(config)
        self.view = nn.Linear(config.hidden_dim, config.term_rank, bias=False)

    def encode(self, candidates: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return self.view(candidates)  # (B, K, R)

    def gain(self, encoding: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        with torch.autocast(encoding.device.type, enabled=False):  # there is no solver in half precision
            precise = torch.promote_types(encoding.dtype, torch.float32)
            encoding, picked = encoding.to(precise), picked.to(precise)
            # by the Woodbury identity in the t picks, which are fewer than the rank
            gram = picked @ picked.transpose(-1, -2)  # (B, G, t, t)
            gram = gram + torch.eye(gram.shape[-1], device=gram.device)
            cross = picked @ encoding.transpose(1, 2).unsqueeze(1)  # (B, G, t, K)
            spanned = (cross * torch.linalg.solve(gram, cross)).sum(2)  # (B, G, K)
            return torch.log1p((encoding.square().sum(-1).unsqueeze(1) - spanned).clamp(min=0.0))


TERMS: dict[str, type[DecoderTerm]] = {"mmr": MMRTerm, "coverage": CoverageTerm, "dpp": DPPTerm}
