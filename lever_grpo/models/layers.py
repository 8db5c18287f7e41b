"""The parts of the pointer selector: attention over the pool, the decoder's state update, the logits by its state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F


if TYPE_CHECKING:
    from .configuration_pointer_selector import PointerSelectorConfig


def take_rows(encoded: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
    """Rows (B, …, H) of `encoded` (B, K, H) at the positions `picks` (B, …), by a look-up, whose backward is several
    times as fast as that of `gather`."""
    if len(encoded) == 1 or not encoded.stride(0):  # all queries have the same rows: no copies of them
        return F.embedding(picks, encoded[0])
    first = torch.arange(len(encoded), device=picks.device) * encoded.shape[1]  # (B,)
    return F.embedding(picks + first.view(-1, *[1] * (picks.dim() - 1)), encoded.flatten(0, 1))


def softmax_over(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Shares of the candidates by their logits (B, N, K), 0 where `mask` (B, K) is false; without one, all count."""
    return (logits if mask is None else logits.masked_fill(~mask.unsqueeze(1), -math.inf)).softmax(-1)


class Attention(nn.Module):
    r"""
    `x` attends to `context`, by several heads. Plain linears, so that LoRA fits.

    A single token, as the decoder's first state is, has its query taken back through the keys' weights rather than
    the whole context projected, \\( q_h \cdot W^k_h c = ({W^k_h}^{\top} q_h) \cdot c \\), and its values are projected
    after their mean is taken: the same function with H / heads times fewer products.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, length, H / heads)

    def attend(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        if x.shape[1] == 1 and type(self.k_proj) is type(self.v_proj) is nn.Linear:  # no adapter on them
            return self.o_proj(self._attend_once(self.q_proj(x), context, mask))
        attended = F.scaled_dot_product_attention(
            self._heads(self.q_proj(x)),
            self._heads(self.k_proj(context)),
            self._heads(self.v_proj(context)),
            attn_mask=None if mask is None else mask[:, None, None],  # (B, 1, 1, K)
        )
        return self.o_proj(attended.transpose(1, 2).flatten(-2))  # (B, length, H)

    def _attend_once(self, query: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """What the heads of one token see, (B, 1, H), by its projection, of the same shape."""
        heads, width = self.num_heads, query.shape[-1]
        query = query.view(-1, heads, width // heads)  # (B, heads, H / heads)
        keys, values = (p.weight.view(heads, -1, width) for p in (self.k_proj, self.v_proj))  # (heads, H / heads, H)
        asked = (query.transpose(0, 1) @ keys).transpose(0, 1)  # (B, heads, H)
        scores = asked @ context.transpose(1, 2) + (query * self._bias(self.k_proj)).sum(-1, keepdim=True)
        weights = softmax_over(scores / math.sqrt(query.shape[-1]), mask)
        seen = ((weights @ context).transpose(0, 1) @ values.transpose(1, 2)).transpose(0, 1)  # (B, heads, H / heads)
        return (seen + self._bias(self.v_proj)).flatten(1).unsqueeze(1)

    def _bias(self, linear: nn.Linear) -> torch.Tensor:
        return linear.bias.view(self.num_heads, -1)  # (heads, H / heads)


class AttentionLayer(Attention):
    """Attention; residual, layer norm, feed-forward."""

    def __init__(self, config: PointerSelectorConfig):
        width = config.hidden_dim
        super().__init__(width, config.num_attention_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = self.attention_norm(x + self.dropout(self.attend(x, context, mask)))
        return self.output_norm(x + self.dropout(self.down_proj(F.gelu(self.up_proj(x)))))  # (B, length, H)


class PointerScore(nn.Module):
    """Logits of candidates by the decoder's state; `kind` as `PointerSelectorConfig.scoring`."""

    def __init__(self, config: PointerSelectorConfig):
        super().__init__()
        self.kind = config.scoring
        width = config.hidden_dim
        self.state_proj = nn.Linear(width, width, bias=False)
        if self.kind == "additive":
            self.candidate_proj = nn.Linear(width, width)
            self.out = nn.Linear(width, 1, bias=False)

    @property
    def last(self) -> nn.Linear:
        """With its weights at zero, all logits are."""
        return self.out if self.kind == "additive" else self.state_proj

    def forward(self, state: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        state = self.state_proj(state)  # (B, G, H)
        if self.kind == "additive":
            hidden = torch.tanh(state.unsqueeze(2) + self.candidate_proj(candidates).unsqueeze(1))  # (B, G, K, H)
            return self.out(hidden).squeeze(-1)  # (B, G, K)
        return state @ candidates.transpose(1, 2) / math.sqrt(candidates.shape[-1])


class StateUpdate(nn.Module):
    """How the decoder's state takes in a pick; `kind` as `PointerSelectorConfig.state_update`."""

    def __init__(self, config: PointerSelectorConfig):
        super().__init__()
        self.kind = config.state_update
        width = config.hidden_dim
        parts = {"additive": 1, "gated": 2, "gru": 3}[self.kind]
        self.from_state = nn.Linear(width, parts * width)
        self.from_pick = nn.Linear(width, parts * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, state: torch.Tensor, from_pick: torch.Tensor) -> torch.Tensor:
        """The state (B, G, H) after a pick, of whose encoding `from_pick` made (B, G, parts * H)."""
        from_state = self.from_state(state)  # (B, G, parts * H)
        if self.kind == "additive":
            return self.norm(state + from_state + from_pick)
        if self.kind == "gated":
            gate, proposal = (from_state + from_pick).chunk(2, dim=-1)
        else:  # Cho et al., 2014, in the form of `torch.nn.GRU`
            state_reset, state_gate, state_proposal = from_state.chunk(3, dim=-1)
            pick_reset, pick_gate, pick_proposal = from_pick.chunk(3, dim=-1)
            gate = state_gate + pick_gate
            proposal = pick_proposal + torch.sigmoid(state_reset + pick_reset) * state_proposal
        proposal = torch.tanh(proposal)
        return self.norm(proposal + torch.sigmoid(gate) * (state - proposal))  # (B, G, H)
