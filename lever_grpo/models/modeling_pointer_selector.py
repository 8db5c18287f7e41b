"""The pointer selector: a pointer network over the candidates of a query's pool."""

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import initialization as init

from .configuration_pointer_selector import PointerSelectorConfig
from .decoder_terms import TERMS, DecoderTerm
from .layers import AttentionLayer, PointerScore, StateUpdate, take_rows
from .modeling_selector import CandidateEncoding, PoolEncoding, Pools, SelectorModel


@dataclass
class PointerEncoding(PoolEncoding):
    """What a pointer selector computes once per query."""

    candidates: torch.Tensor  # (B, K, H)
    terms: dict[str, torch.Tensor] = field(default_factory=dict)  # what each of the decoder's terms needs


class PointerSelector(SelectorModel):
    r"""
    A pointer network (Vinyals et al., 2015) that picks demonstrations one after the other:

    $$ \pi(y \mid q) = \prod_{t=1}^{S} \operatorname{softmax}_{c \notin a_{<t}} \left(
       \frac{\langle W s_t, e_c \rangle}{\sqrt{H}} + \text{prior}_t(c) + \text{terms}_t(c) \right)_{a_t}, \quad
       s_{t+1} = \text{update}(s_t, e_{a_t}) $$

    The state \\(s_t\\) depends on the query and on what was picked before, in order. The encoder runs once per query,
    whatever the number of sequences that are scored.

    Args:
        config ([`PointerSelectorConfig`]):
            What the selector is made of.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo import PointerSelector, PointerSelectorConfig

    >>> selector = PointerSelector(PointerSelectorConfig(embed_dim=8, hidden_dim=16)).eval()
    >>> query, pool = torch.randn(2, 8), torch.randn(2, 5, 8)
    >>> picks = selector.select(query_embeds=query, candidate_embeds=pool, num_shots=3)
    >>> picks.sequences.shape
    torch.Size([2, 1, 3])
    >>> output = selector(query_embeds=query, candidate_embeds=pool, sequences=picks.sequences)
    >>> torch.allclose(output.log_probs.sum(-1), picks.scores, atol=1e-5)
    True

    ```
    """

    config: PointerSelectorConfig
    config_class = PointerSelectorConfig
    _no_split_modules = ["AttentionLayer"]

    def __init__(self, config: PointerSelectorConfig):
        super().__init__(config)
        self.pointer: PointerScore | None = None
        if config.encoder != "none":
            self._build_network(config)
        self.post_init()

    def _build_network(self, config: PointerSelectorConfig) -> None:
        width = config.hidden_dim
        self.query_proj = nn.Linear(sum(config.query_features.values()), width)
        self.query_norm = nn.LayerNorm(width)
        self.candidate_proj = nn.Linear(sum(config.candidate_features.values()), width)
        self.candidate_norm = nn.LayerNorm(width)
        num_layers = config.num_layers if config.encoder == "cross_attention" else 0
        self.layers = nn.ModuleList(AttentionLayer(config) for _ in range(num_layers))
        self.set_layers = nn.ModuleList(AttentionLayer(config) for _ in range(config.num_set_layers))
        if config.num_set_layers and config.similarity_prior:
            self.relation_proj = nn.Linear(len(config.prior_pairs) + 1, width, bias=False)
        self.state_update = StateUpdate(config)
        self.pointer = PointerScore(config)
        self.terms = nn.ModuleDict({name: TERMS[name](config) for name in config.decoder_terms})
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.pointer is not None and module is self.pointer.last and self.prior is not None:
            # The correction starts at zero, so that the untrained selector is the similarity baseline. Not done
            # with the selector itself in hand: transformers passes over modules that own no weights.
            init.zeros_(module.weight)
        elif isinstance(module, DecoderTerm):
            module.reset_parameters()

    def encode_candidates(self, candidate_embeds: torch.Tensor) -> CandidateEncoding:
        encoding = super().encode_candidates(candidate_embeds)
        if self.pointer is not None:
            encoding.hidden = self.candidate_norm(self.candidate_proj(encoding.embeds))
        return encoding

    def encode(self, query_embeds, candidate_embeds, candidate_mask=None, candidate_indices=None) -> PointerEncoding:
        pools = self.check_inputs(query_embeds, candidate_embeds, candidate_mask, candidate_indices)
        available = pools.mask.unsqueeze(1)
        if pools.candidates.hidden is None:
            nothing = pools.query_embeds.new_zeros(*pools.mask.shape, 0)
            return PointerEncoding(nothing[:, :1], available, pools.prior, nothing)
        candidates = pools.gather(pools.candidates.hidden)  # (B, K, H)
        state = self.query_norm(self.query_proj(pools.query_embeds)).unsqueeze(1)  # (B, 1, H)
        if self.set_layers:
            candidates = candidates + state
            if pools.prior is not None:
                candidates = candidates + self.relation_proj(self._relations(pools))
            for layer in self.set_layers:
                candidates = layer(candidates, candidates, pools.attendable)
        for layer in self.layers:
            state = layer(state, candidates, pools.attendable)
        candidates = self.dropout(candidates)
        terms = {name: term.encode(candidates, state) for name, term in self._terms()}
        return PointerEncoding(state, available, pools.prior, candidates, terms)

    def _terms(self) -> list[tuple[str, DecoderTerm]]:
        return list(self.terms.items())  # type: ignore[arg-type]

    @staticmethod
    def _relations(pools: Pools) -> torch.Tensor:
        """How each candidate relates to the query: its prior logit within the pool and its cosines, (B, K, P + 1)."""
        prior = pools.prior
        assert prior is not None
        mask = pools.mask if pools.attendable is None else pools.attendable
        logits = torch.where(mask, prior.first, 0.0)
        logits = prior.first - logits.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        return torch.cat([logits.unsqueeze(-1), 5.0 * prior.cosines.transpose(1, 2)], dim=-1).detach()

    def step_logits(self, encoding: PointerEncoding, state: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        if self.pointer is None:
            assert self.prior is not None  # says the config
            return self.prior(encoding.prior, picks)
        return self._in_view_of(encoding, picks, self.pointer(state, encoding.candidates))

    def _in_view_of(self, encoding: PointerEncoding, picks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The pointer's logits (B, G, K) with what the prior and the decoder's terms add after `picks` (B, G, t)."""
        if self.prior is not None:
            logits = self.prior(encoding.prior, picks) + logits
        if picks.shape[-1]:
            for name, term in self._terms():
                logits = logits + term(encoding.terms[name], picks)
        return logits

    def advance(self, encoding: PointerEncoding, state: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        if self.pointer is None:
            return state
        return self.state_update(state, self._from_picks(encoding, pick))

    def teacher_forced(
        self, encoding: PointerEncoding, picks: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        if self.pointer is None:
            return super().teacher_forced(encoding, picks)
        states = [encoding.state]
        for from_pick in self._from_picks(encoding, picks).unbind(2):
            states.append(self.state_update(states[-1], from_pick))
        # all states at once: one product, and one gradient of the candidates
        logits = self.pointer(torch.cat(states, dim=1), encoding.candidates)  # (B, 1 + G * t, K)
        steps = logits.split([state.shape[1] for state in states], dim=1)
        return states, [self._in_view_of(encoding, picks[..., :step], found) for step, found in enumerate(steps)]

    def _from_picks(self, encoding: PointerEncoding, picks: torch.Tensor) -> torch.Tensor:
        """What the state's update makes of picks (B, G, …): (B, G, …, parts * H)."""
        candidates, project = encoding.candidates, self.state_update.from_pick
        if picks.shape[1:].numel() > candidates.shape[1]:  # the fewer products
            return take_rows(project(candidates), picks)
        return project(take_rows(candidates, picks))
