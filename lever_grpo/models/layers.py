"""The parts of the pointer selector: attention over the pool, and the decoder's state update."""

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_pointer_selector import PointerSelectorConfig


class AttentionLayer(nn.Module):
    """`x` attends to `context`; residual, layer norm, feed-forward. Plain linears, so that LoRA fits."""

    def __init__(self, config: PointerSelectorConfig):
        super().__init__()
        width = config.hidden_dim
        self.num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.up_proj = nn.Linear(width, 2 * width)
        self.down_proj = nn.Linear(2 * width, width)
        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, length, H / heads)

    def forward(self, x: torch.Tensor, context: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended = F.scaled_dot_product_attention(
            self._heads(self.q_proj(x)),
            self._heads(self.k_proj(context)),
            self._heads(self.v_proj(context)),
            attn_mask=mask[:, None, None],  # (B, 1, 1, K)
        )
        x = self.attention_norm(x + self.dropout(self.o_proj(attended.transpose(1, 2).flatten(-2))))
        return self.output_norm(x + self.dropout(self.down_proj(F.gelu(self.up_proj(x)))))  # (B, length, H)


class StateUpdate(nn.Module):
    """How the decoder's state takes in a pick; `kind` as `PointerSelectorConfig.state_update`."""

    def __init__(self, config: PointerSelectorConfig):
        super().__init__()
        self.kind = config.state_update
        width = config.hidden_dim
        parts = 2 if self.kind == "gated" else 1
        self.from_state = nn.Linear(width, parts * width)
        self.from_pick = nn.Linear(width, parts * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, state: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        change = self.from_state(state) + self.from_pick(pick)  # (B, G, H) or (B, G, 2H)
        if self.kind == "additive":
            return self.norm(state + change)
        gate, proposal = change.chunk(2, dim=-1)
        gate = torch.sigmoid(gate)
        return self.norm(gate * state + (1 - gate) * torch.tanh(proposal))  # (B, G, H)
