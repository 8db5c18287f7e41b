"""Selectors laid out as the public Lever-Plus checkpoints are, and their function in loops, one query at a time."""

import math

import torch
from torch import nn


WIDTH = 8
# name: options of `PublicSelector`
PUBLIC = {
    "v1": {"version": "v1"},
    "v1-weighted": {"version": "v1", "update": "weighted", "temperature": 0.5},
    "v2": {"version": "v2", "hidden": 6},
    "v2-heads": {"version": "v2", "hidden": 6, "heads": 2},
    "v2-identity": {"version": "v2", "hidden": WIDTH},
    "v2-identity-heads": {"version": "v2", "hidden": WIDTH, "heads": 2},
    "v2-layers": {"version": "v2", "hidden": 6, "layers": 3},
    "v2-gated": {"version": "v2", "hidden": 6, "layers": 2, "update": "gated"},
}


class PublicSelector(nn.Module):
    """`layers` of 0 is the layout of a single attention layer without a list around it."""

    def __init__(self, version, hidden=WIDTH, heads=1, layers=0, update=None, temperature=0.1):
        super().__init__()
        self.version, self.update, self.temperature, self.layers = version, update, temperature, layers
        if version == "v1":
            self.query_proj, self.cand_proj = self.tower(), self.tower()
        else:
            self.input_proj = nn.Identity() if hidden == WIDTH else nn.Linear(WIDTH, hidden, bias=False)
            if layers:
                self.cross_attn_layers = nn.ModuleList(self.attention(hidden, heads) for _ in range(layers))
                self.attn_norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(layers))
            else:
                self.cross_attn, self.attn_norm = self.attention(hidden, heads), nn.LayerNorm(hidden)
            self.query_proj = nn.Linear(hidden, hidden, bias=False)
            self.cand_proj = nn.Linear(hidden, hidden, bias=False)
        if update == "weighted":
            self.query_update_weight = nn.Parameter(torch.tensor(0.6))
        elif update == "gated":
            self.query_update_gate = nn.Linear(2 * hidden, hidden)

    @staticmethod
    def tower():
        first, second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        return nn.Sequential(first, nn.LayerNorm(WIDTH), nn.ReLU(), nn.Dropout(0.5), second, nn.LayerNorm(WIDTH))

    @staticmethod
    def attention(hidden, heads):
        return nn.MultiheadAttention(hidden, heads, dropout=0.1, batch_first=True)

    def vectors(self, query, pool):
        """Of a query (D,) and its candidates (K, D)."""
        if self.version == "v1":
            return self.query_proj(query), [self.cand_proj(row) for row in pool]
        query, pool = self.input_proj(query), torch.stack([self.input_proj(row) for row in pool])
        attentions = zip(self.cross_attn_layers, self.attn_norms, strict=True) if self.layers else None
        for attention, norm in attentions or [(self.cross_attn, self.attn_norm)]:
            seen, _ = attention(query[None, None], pool[None], pool[None])
            query = norm(seen[0, 0] + query)
        return self.query_proj(query), [self.cand_proj(row) for row in pool]

    def logits(self, query, pool, sequence):
        """Of each step of a given sequence, with -100 for what was picked."""
        state, vectors = self.vectors(query, pool)
        state, vectors = state / state.norm(), [vector / vector.norm() for vector in vectors]
        steps = []
        for step in range(len(sequence)):
            scores = [float(state @ vector) / self.temperature for vector in vectors]
            steps.append([-100.0 if i in sequence[:step] else score for i, score in enumerate(scores)])
            picked = vectors[sequence[step]]
            if self.update == "weighted":
                kept = 1 / (1 + math.exp(-float(self.query_update_weight)))
                state = kept * state + (1 - kept) * picked
            elif self.update == "gated":
                kept = torch.sigmoid(self.query_update_gate(torch.cat([state, picked])))
                state = kept * state + (1 - kept) * picked
            elif self.version == "v1":
                state = (state + picked) / 2
            state = state / state.norm()
        return torch.tensor(steps)

    def greedy(self, query, pool, shots):
        sequence = []
        for _ in range(shots):
            scores = self.logits(query, pool, [*sequence, 0])[-1]
            sequence.append(int(scores.argmax()))
        return sequence


def public_selector(name: str) -> PublicSelector:
    """In evaluation mode, with every weight away from its start."""
    torch.manual_seed(sum(map(ord, name)))
    selector = PublicSelector(**PUBLIC[name]).eval()
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return selector
