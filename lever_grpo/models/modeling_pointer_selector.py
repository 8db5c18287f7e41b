"""The pointer selector: a policy over sequences of distinct demonstrations from a query's pool."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_pointer_selector import PointerSelectorConfig
from .input_checks import check_pools, check_sequences, check_temperature
from .layers import AttentionLayer, StateUpdate
from .similarity_prior import PriorEncoding, SimilarityPrior


@dataclass
class PointerSelectorOutput(ModelOutput):
    """
    Output of [`PointerSelector.forward`].

    Args:
        log_probs (`torch.Tensor` of shape `(B, G, S)`):
            `log π(a_t | q, a_<t)` of every given step, 0 where `sequence_mask` is false.
        step_log_probs (`torch.Tensor` of shape `(B, G, S, K)`, *optional*):
            The whole distribution of each step, `-inf` for candidates that are padded or already picked.
    """

    log_probs: torch.Tensor | None = None
    step_log_probs: torch.Tensor | None = None


@dataclass
class SelectionOutput(ModelOutput):
    """
    Output of [`PointerSelector.select`].

    Args:
        sequences (`torch.Tensor` of shape `(B, R, S)`):
            Pool positions in search order (first pick first); R sequences per query, the most probable first.
        scores (`torch.Tensor` of shape `(B, R)`):
            Their log-probabilities; `-inf` marks a place for which the pool has no further sequence.
    """

    sequences: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass
class PoolEncoding:
    """What is computed once per query, whatever the number of sequences."""

    state: torch.Tensor  # (B, 1, H) the decoder's state before the first pick
    candidates: torch.Tensor  # (B, K, H)
    available: torch.Tensor  # (B, 1, K) bool
    prior: PriorEncoding | None


class PointerSelector(PreTrainedModel):
    r"""
    A pointer network (Vinyals et al., 2015) that picks demonstrations one after the other:

    $$ \pi(y \mid q) = \prod_{t=1}^{S} \operatorname{softmax}_{c \notin a_{<t}} \left(
       \frac{\langle W s_t, e_c \rangle}{\sqrt{H}} + \text{prior}_t(c) \right)_{a_t}, \quad
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
    base_model_prefix = "selector"
    main_input_name = "query_embeds"
    accepts_loss_kwargs = False  # the trainer must not take `**kwargs` of `forward` for the loss's
    _supports_sdpa = True
    _no_split_modules = ["AttentionLayer"]

    def __init__(self, config: PointerSelectorConfig):
        super().__init__(config)
        self.prior = SimilarityPrior(config) if config.similarity_prior else None
        self.pointer: nn.Linear | None = None
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
        self.pointer = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
            if module is self.pointer and self.prior is not None:
                # The correction starts at zero, so that the untrained selector is the similarity baseline. Not done
                # with the selector itself in hand: transformers passes over modules that own no weights.
                init.zeros_(module.weight)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SimilarityPrior):
            module.reset_parameters()

    def encode(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor,
        candidate_mask: torch.Tensor | None = None,
        candidate_indices: torch.Tensor | None = None,
    ) -> PoolEncoding:
        """
        Encodes queries and pools; arguments as in [`~PointerSelector.forward`].

        Returns:
            `PoolEncoding`: What all sequences of a query share.
        """
        batch = query_embeds.shape[0]
        check_pools(self.config, query_embeds, candidate_embeds, candidate_mask, candidate_indices)
        if candidate_embeds.dim() == 2 and candidate_indices is None:
            candidate_indices = torch.arange(candidate_embeds.shape[0], device=candidate_embeds.device)
            candidate_indices = candidate_indices.expand(batch, -1)

        query_embeds, candidate_embeds = query_embeds.to(self.dtype), candidate_embeds.to(self.dtype)
        if candidate_embeds.dim() == 3 and candidate_mask is not None:
            # a masked value that overflows would still reach the weights' gradient, as 0 · inf
            candidate_embeds = candidate_embeds.masked_fill(~candidate_mask.bool().unsqueeze(-1), 0.0)
        if candidate_mask is None:
            pool = candidate_embeds.shape[1] if candidate_indices is None else candidate_indices.shape[1]
            candidate_mask = query_embeds.new_ones(batch, pool)
        candidate_mask = candidate_mask.bool()
        # a query without candidates (padding of a batch) attends to anything: its steps are masked by the caller
        attendable = candidate_mask | ~candidate_mask.any(-1, keepdim=True)

        prior = None
        if self.prior is not None:
            prior = self.prior.encode(query_embeds, candidate_embeds, attendable, candidate_indices)
        if self.pointer is None:
            nothing = query_embeds.new_zeros(*candidate_mask.shape, 0)
            return PoolEncoding(nothing[:, :1], nothing, candidate_mask.unsqueeze(1), prior)
        candidates = self.candidate_norm(self.candidate_proj(candidate_embeds))  # (U, H) or (B, K, H)
        if candidate_indices is not None:
            candidates = candidates[candidate_indices]  # (B, K, H)
        state = self.query_norm(self.query_proj(query_embeds)).unsqueeze(1)  # (B, 1, H)
        if self.set_layers:
            candidates = candidates + state
            if prior is not None:
                candidates = candidates + self.relation_proj(self._relations(prior, attendable))
            for layer in self.set_layers:
                candidates = layer(candidates, candidates, attendable)
        for layer in self.layers:
            state = layer(state, candidates, attendable)
        return PoolEncoding(state, self.dropout(candidates), candidate_mask.unsqueeze(1), prior)

    @staticmethod
    def _relations(prior: PriorEncoding, mask: torch.Tensor) -> torch.Tensor:
        """How each candidate relates to the query: its prior logit within the pool and its cosines, (B, K, P + 1)."""
        logits = torch.where(mask, prior.first, 0.0)
        logits = prior.first - logits.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)
        return torch.cat([logits.unsqueeze(-1), 5.0 * prior.cosines], dim=-1).detach()

    def _step_log_probs(
        self,
        encoding: PoolEncoding,
        state: torch.Tensor,  # (B, G, H); G may be 1 before the first pick
        available: torch.Tensor,  # (B, G, K)
        picks: torch.Tensor,  # (B, G, t) what was picked so far
        temperature: float,
    ) -> torch.Tensor:
        logits = state.new_zeros(()) if self.prior is None else self.prior(encoding.prior, picks)
        if self.pointer is not None:
            scores = self.pointer(state) @ encoding.candidates.transpose(1, 2)
            logits = logits + scores / math.sqrt(self.config.hidden_dim)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        # where nothing is left (padded steps) the distribution is that of the whole pool: finite, and masked later
        available = available | ~available.any(-1, keepdim=True)
        return torch.log_softmax((logits / temperature).masked_fill(~available, -math.inf), dim=-1)  # (B, G, K)

    def _advance(
        self, encoding: PoolEncoding, state: torch.Tensor, available: torch.Tensor, pick: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """State and availability after `pick` (B, G)."""
        if self.pointer is not None:
            width = encoding.candidates.shape[-1]
            picked = encoding.candidates.gather(1, pick.unsqueeze(-1).expand(-1, -1, width))  # (B, G, H)
            state = self.state_update(state, picked)
        available = available.expand(*pick.shape, -1).scatter(-1, pick.unsqueeze(-1), False)
        return state, available

    def forward(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor,
        candidate_mask: torch.Tensor | None = None,
        sequences: torch.Tensor | None = None,
        sequence_mask: torch.Tensor | None = None,
        candidate_indices: torch.Tensor | None = None,
        temperature: float = 1.0,
        return_step_log_probs: bool = False,
        **kwargs,
    ) -> PointerSelectorOutput:
        r"""
        Log-probabilities of given sequences, teacher-forced in one batched pass.

        Args:
            query_embeds (`torch.Tensor` of shape `(B, D_q)`):
                Query embeddings, the features of `config.query_features` side by side.
            candidate_embeds (`torch.Tensor` of shape `(B, K, D_c)` or `(U, D_c)`):
                Embeddings of each query's pool, or of U candidates that the queries share.
            candidate_mask (`torch.Tensor` of shape `(B, K)`, *optional*):
                False where a pool is padded.
            sequences (`torch.Tensor` of shape `(B, G, S)`):
                Pool positions in search order (first pick first). Padded positions may hold any valid position.
            sequence_mask (`torch.Tensor` of shape `(B, G, S)`, *optional*):
                False where a sequence or a group is padded.
            candidate_indices (`torch.Tensor` of shape `(B, K)`, *optional*):
                With shared candidates: the rows of `candidate_embeds` that form each query's pool. Without it every
                query has all of them.
            temperature (`float`, *optional*, defaults to `1.0`):
                Divides the logits.
            return_step_log_probs (`bool`, *optional*, defaults to `False`):
                Whether to return the whole distribution of each step as well.
            **kwargs:
                Accepted when `None`: peft's feature extraction wrapper hands on arguments of language models.

        Returns:
            [`PointerSelectorOutput`]: A sequence that repeats a candidate or picks a padded one has log-probability
            `-inf`.

        Raises:
            ValueError: if shapes do not fit each other or the config, or `temperature` is not above 0.
            TypeError: for an unknown argument that is not `None`.
        """
        unknown = [name for name, value in kwargs.items() if value is not None]
        if unknown:
            raise TypeError(f"forward got {unknown[0]!r}, which a selector does not take; leave it out.")
        if sequences is None:
            raise ValueError("forward needs `sequences` (B, G, S); to have them chosen, call `select`.")
        check_temperature(temperature)
        encoding = self.encode(query_embeds, candidate_embeds, candidate_mask, candidate_indices)
        check_sequences(query_embeds, sequences, sequence_mask)
        batch, group, shots = sequences.shape
        pool = encoding.candidates.shape[1]
        if sequence_mask is None:
            sequence_mask = torch.ones_like(sequences, dtype=torch.bool)
        state, available = encoding.state, encoding.available

        log_probs, step_log_probs = [], []
        for step in range(shots):
            distribution = self._step_log_probs(encoding, state, available, sequences[..., :step], temperature)
            distribution = distribution.expand(-1, group, -1)  # the first step is the same for all sequences
            pick, live = sequences[..., step], sequence_mask[..., step].bool()
            log_prob = distribution.gather(-1, pick.unsqueeze(-1)).squeeze(-1)  # (B, G)
            log_probs.append(torch.where(live, log_prob, 0.0))
            if return_step_log_probs:
                step_log_probs.append(distribution)
            if step + 1 < shots:
                state, available = self._advance(encoding, state, available, pick)
        empty = encoding.state.new_zeros(batch, group, 0)
        return PointerSelectorOutput(
            log_probs=torch.stack(log_probs, dim=-1) if log_probs else empty,
            step_log_probs=(
                torch.stack(step_log_probs, dim=2) if step_log_probs else empty.unsqueeze(-1).expand(-1, -1, -1, pool)
            )
            if return_step_log_probs
            else None,
        )

    @torch.no_grad()
    def select(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor,
        candidate_mask: torch.Tensor | None = None,
        num_shots: int = 2,
        candidate_indices: torch.Tensor | None = None,
        num_beams: int = 1,
        do_sample: bool = False,
        num_return_sequences: int | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> SelectionOutput:
        r"""
        Picks demonstrations without repeats: greedy (the default), beam search (`num_beams > 1`) or sampling.

        Args:
            query_embeds, candidate_embeds, candidate_mask, candidate_indices:
                As in [`~PointerSelector.forward`].
            num_shots (`int`, *optional*, defaults to `2`):
                Number S of demonstrations; at most the number of candidates of the smallest pool.
            num_beams (`int`, *optional*, defaults to `1`):
                Width of the beam search; 1 is greedy.
            do_sample (`bool`, *optional*, defaults to `False`):
                Whether to draw from the policy instead.
            num_return_sequences (`int`, *optional*):
                Sequences per query: at most `num_beams` when searching (default 1), any number when sampling.
            temperature (`float`, *optional*, defaults to `1.0`):
                Divides the logits; scores are of the tempered policy.
            generator (`torch.Generator`, *optional*):
                Source of randomness when sampling.

        Returns:
            [`SelectionOutput`]: the sequences, sorted by score.

        Raises:
            ValueError: if a pool has fewer candidates than `num_shots`, or the decoding options contradict each
                other.
        """
        if do_sample and num_beams != 1:
            raise ValueError(f"num_beams={num_beams} with do_sample=True: sampling has no beams; leave one of them.")
        returned = 1 if num_return_sequences is None else num_return_sequences
        for name, value in (("num_shots", num_shots), ("num_beams", num_beams), ("num_return_sequences", returned)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        check_temperature(temperature)
        if not do_sample and returned > num_beams:
            raise ValueError(
                f"num_return_sequences={returned} is more than num_beams={num_beams}; raise num_beams or sample."
            )
        encoding = self.encode(query_embeds, candidate_embeds, candidate_mask, candidate_indices)
        batch, _, pool = encoding.available.shape
        smallest = int(encoding.available.sum(-1).min()) if batch else pool
        if num_shots > smallest:
            raise ValueError(
                f"num_shots={num_shots} is more than the {smallest} candidates of the smallest pool, and no candidate "
                "is picked twice; lower num_shots or enlarge the pools."
            )

        width = returned if do_sample else num_beams
        state = encoding.state.expand(-1, width, -1)
        available = encoding.available.expand(-1, width, -1)
        sequences = torch.empty(batch, width, 0, dtype=torch.long, device=state.device)
        scores = torch.zeros(batch, width, device=state.device)
        if not do_sample:
            scores[:, 1:] = -math.inf  # all beams are equal before the first pick: keep one
        for _ in range(num_shots):
            distribution = self._step_log_probs(encoding, state, available, sequences, temperature)  # (B, R, K)
            if do_sample:
                pick = torch.multinomial(distribution.exp().flatten(0, 1), 1, generator=generator).view(batch, width)
                scores = scores + distribution.gather(-1, pick.unsqueeze(-1)).squeeze(-1)
            else:
                total = (scores.unsqueeze(-1) + distribution).flatten(1)  # (B, R * K)
                scores, best = total.topk(min(width, total.shape[1]), dim=-1)
                scores = F.pad(scores, (0, width - scores.shape[1]), value=-math.inf)
                best = F.pad(best, (0, width - best.shape[1]))
                parent, pick = best // pool, best % pool
                state = state.gather(1, parent.unsqueeze(-1).expand_as(state))
                available = available.gather(1, parent.unsqueeze(-1).expand_as(available))
                sequences = sequences.gather(1, parent.unsqueeze(-1).expand_as(sequences))
            sequences = torch.cat([sequences, pick.unsqueeze(-1)], dim=-1)
            state, available = self._advance(encoding, state, available, pick)
        order = scores.argsort(dim=-1, descending=True, stable=True)[:, :returned]
        return SelectionOutput(
            sequences=sequences.gather(1, order.unsqueeze(-1).expand(-1, -1, num_shots)),
            scores=scores.gather(1, order),
        )
