"""The selectors of the public Lever-Plus code, as the same functions of the same weights."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_lever_plus import LeverPlusSelectorConfig
from .layers import Attention, take_rows
from .modeling_selector import PoolEncoding, SelectorModel


@dataclass
class LeverPlusEncoding(PoolEncoding):
    """What a Lever-Plus selector computes once per query."""

    candidates: torch.Tensor  # (B, K, H) of unit length


class Tower(nn.Module):
    """Two layers for one side: linear, norm, ReLU, dropout, linear, norm."""

    def __init__(self, width: int, config: LeverPlusSelectorConfig):
        super().__init__()
        self.up_proj = nn.Linear(width, config.hidden_dim)
        self.up_norm = nn.LayerNorm(config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.down_proj = nn.Linear(config.hidden_dim, config.hidden_dim)
        self.down_norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_norm(self.down_proj(self.dropout(F.relu(self.up_norm(self.up_proj(x))))))


class PoolAttention(Attention):
    """The query attends to its pool; residual, layer norm."""

    def __init__(self, config: LeverPlusSelectorConfig):
        super().__init__(config.hidden_dim, config.num_attention_heads)
        self.norm = nn.LayerNorm(config.hidden_dim)

    def forward(self, query: torch.Tensor, candidates: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return self.norm(query + self.attend(query, candidates, mask))  # (B, 1, H)


class PickUpdate(nn.Module):
    """The query's vector after a pick, at unit length; `kind` as `LeverPlusSelectorConfig.pick_update`."""

    def __init__(self, config: LeverPlusSelectorConfig):
        super().__init__()
        self.kind = config.pick_update
        if self.kind == "weighted":
            self.weight = nn.Parameter(torch.empty(1))  # the logit of the share that is kept
        elif self.kind == "gated":
            self.gate = nn.Linear(2 * config.hidden_dim, config.hidden_dim)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.kind == "weighted":
            init.constant_(self.weight, 0.6)  # Lever-Plus's own start

    def forward(self, state: torch.Tensor, picked: torch.Tensor) -> torch.Tensor:
        if self.kind == "none":
            return state
        if self.kind == "average":
            return F.normalize((state + picked) / 2, dim=-1)
        if self.kind == "weighted":
            kept = torch.sigmoid(self.weight)
        else:
            kept = torch.sigmoid(self.gate(torch.cat([state.expand_as(picked), picked], dim=-1)))
        return F.normalize(kept * state + (1 - kept) * picked, dim=-1)  # (B, G, H)


class LeverPlusSelector(SelectorModel):
    r"""
    The selectors of the public Lever-Plus code: a candidate's logit is the cosine of its vector and the query's,
    divided by `config.logit_temperature`:

    $$ \pi(y \mid q) = \prod_{t=1}^{S} \operatorname{softmax}_{c \notin a_{<t}}
       \left( \cos(s_t, e_c) / \tau \right)_{a_t}, \quad s_{t+1} = \text{update}(s_t, e_{a_t}) $$

    With the weights of a public checkpoint (`lever-grpo convert`) it gives that selector's numbers. Three things are
    its own: what was picked has probability zero, where Lever-Plus sets its logit to -100; pools may differ in size
    within a batch; and query and candidates may differ in width, in which case v2 projects each by weights of its own.

    Args:
        config ([`LeverPlusSelectorConfig`]):
            What the selector is made of.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo.models import LeverPlusSelector, LeverPlusSelectorConfig

    >>> selector = LeverPlusSelector(LeverPlusSelectorConfig(embed_dim=8, hidden_dim=16)).eval()
    >>> query, pool = torch.randn(2, 8), torch.randn(2, 5, 8)
    >>> picks = selector.select(query_embeds=query, candidate_embeds=pool, num_shots=3)
    >>> picks.sequences.shape
    torch.Size([2, 1, 3])

    ```
    """

    config: LeverPlusSelectorConfig
    config_class = LeverPlusSelectorConfig
    _no_split_modules = ["PoolAttention", "Tower"]

    def __init__(self, config: LeverPlusSelectorConfig):
        super().__init__(config)
        query_width, candidate_width = sum(config.query_features.values()), sum(config.candidate_features.values())
        if config.version == "v1":
            self.query_proj: nn.Module = Tower(query_width, config)
            self.candidate_proj: nn.Module = Tower(candidate_width, config)
        else:
            self._build_attention(config, query_width, candidate_width)
        self.pick_update = PickUpdate(config)
        self.dropout = nn.Dropout(config.dropout)
        self.post_init()

    def _build_attention(self, config: LeverPlusSelectorConfig, query_width: int, candidate_width: int) -> None:
        def projection(width: int) -> nn.Module:
            same = width == config.hidden_dim
            return nn.Identity() if same else nn.Linear(width, config.hidden_dim, bias=False)

        self.input_proj = projection(query_width)
        self.candidate_input_proj = None if candidate_width == query_width else projection(candidate_width)
        self.layers = nn.ModuleList(PoolAttention(config) for _ in range(config.num_layers))
        self.query_proj = nn.Linear(config.hidden_dim, config.hidden_dim, bias=False)
        self.candidate_proj = nn.Linear(config.hidden_dim, config.hidden_dim, bias=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PickUpdate):
            module.reset_parameters()
        elif isinstance(module, nn.Linear) and module in (self.query_proj, self.candidate_proj):
            # near the identity, as in Lever-Plus: untrained, v2 compares what the inputs are projected to
            noise = 0.01 * torch.randn_like(module.weight)
            init.copy_(module.weight, torch.eye(*module.weight.shape).to(noise) + noise)

    def encode(self, query_embeds, candidate_embeds, candidate_mask=None, candidate_indices=None) -> LeverPlusEncoding:
        pools = self.check_inputs(query_embeds, candidate_embeds, candidate_mask, candidate_indices)
        if self.config.version == "v1":
            state = self.query_proj(pools.query_embeds).unsqueeze(1)  # (B, 1, H)
            candidates = pools.gather(self.candidate_proj(pools.candidate_embeds))  # (B, K, H)
        else:
            state = self.input_proj(pools.query_embeds).unsqueeze(1)
            candidates = (self.candidate_input_proj or self.input_proj)(pools.candidate_embeds)
            context = pools.gather(candidates)
            for layer in self.layers:
                state = layer(state, context, pools.attendable)
            state = self.dropout(self.query_proj(state))
            candidates = self.dropout(pools.gather(self.candidate_proj(candidates)))
        state, candidates = F.normalize(state, dim=-1), F.normalize(candidates, dim=-1)
        return LeverPlusEncoding(state, pools.mask.unsqueeze(1), None, candidates)

    def step_logits(self, encoding: LeverPlusEncoding, state: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        return state @ encoding.candidates.transpose(1, 2) / self.config.logit_temperature

    def advance(self, encoding: LeverPlusEncoding, state: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        return self.pick_update(state, take_rows(encoding.candidates, pick))
