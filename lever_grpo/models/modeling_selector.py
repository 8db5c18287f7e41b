"""What all selectors share: log-probabilities of given sequences, and decoding without repeats."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_selector import SelectorConfig
from .input_checks import check_pools, check_sequences, check_temperature
from .similarity_prior import PriorEncoding, SimilarityPrior


logger = logging.getLogger(__name__)


@dataclass
class SelectorOutput(ModelOutput):
    """
    Output of [`SelectorModel.forward`]. T is S or, where `config.stop` is set, S + 1.

    Args:
        log_probs (`torch.Tensor` of shape `(B, G, T)`):
            `log π(a_t | q, a_<t)` of every step, 0 where `step_mask` is false.
        step_mask (`torch.Tensor` of shape `(B, G, T)`):
            Which steps were the policy's: `sequence_mask` and, with `config.stop`, the step at which it ended a
            sequence that is shorter than `config.max_shots`.
        step_log_probs (`torch.Tensor` of shape `(B, G, T, A)`, *optional*):
            The whole distribution of each step, `-inf` for candidates that are padded or already picked. A is the
            number K of candidates; with `config.stop` K + 1, the last of which is to stop.
    """

    log_probs: torch.Tensor | None = None
    step_mask: torch.Tensor | None = None
    step_log_probs: torch.Tensor | None = None


@dataclass
class SelectionOutput(ModelOutput):
    """
    Output of [`SelectorModel.select`].

    Args:
        sequences (`torch.Tensor` of shape `(B, R, S)`):
            Pool positions in search order (first pick first); R sequences per query, the most probable first. With
            `config.stop`, -1 behind the end of a sequence.
        scores (`torch.Tensor` of shape `(B, R)`):
            Their log-probabilities; `-inf` marks a place for which the pool has no further sequence.
    """

    sequences: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass
class CandidateEncoding:
    """What depends on candidates alone, (B, K, …) of pools or (U, …) of shared candidates."""

    embeds: torch.Tensor  # (…, D_c) in the selector's dtype
    vectors: dict[str, torch.Tensor]  # (…, D) what the prior compares, by feature
    hidden: torch.Tensor | None = None  # (…, H) where a kind of selector computes it

    def rows(self, index: torch.Tensor) -> "CandidateEncoding":
        """Some of the shared candidates."""
        return CandidateEncoding(
            self.embeds[index],
            {name: vectors[index] for name, vectors in self.vectors.items()},
            None if self.hidden is None else self.hidden[index],
        )


@dataclass
class Pools:
    """Checked inputs of a selector."""

    query_embeds: torch.Tensor  # (B, D_q)
    candidates: CandidateEncoding
    indices: torch.Tensor | None  # (B, K) rows of the shared candidates, if not all of them
    mask: torch.Tensor  # (B, K) bool
    attendable: torch.Tensor | None  # (B, K) bool, at least one candidate each; None where no pool is padded
    prior: PriorEncoding | None

    @property
    def candidate_embeds(self) -> torch.Tensor:
        """(B, K, D_c) or (U, D_c)."""
        return self.candidates.embeds

    def gather(self, encoded: torch.Tensor) -> torch.Tensor:
        """(B, K, H) of candidates that were encoded once each, (U, H) or (B, K, H)."""
        if self.indices is None:
            return encoded.expand(len(self.query_embeds), -1, -1)  # what is shared is everybody's pool
        return F.embedding(self.indices, encoded)  # instead of an index: its backward is twice as fast


@dataclass
class PoolEncoding:
    """What is computed once per query, whatever the number of sequences."""

    state: torch.Tensor  # (B, 1, …) the decoder's state before the first pick
    available: torch.Tensor  # (B, 1, K) bool
    prior: PriorEncoding | None


class SelectorModel(PreTrainedModel):
    r"""
    A policy over sequences of distinct demonstrations from a query's pool. Kinds of selectors say, in three methods,
    what a query and its pool are encoded to (`encode`), what the logits of the next pick are (`step_logits`), and how
    the decoder's state takes in a pick (`advance`); the state may be any tensor `(B, G, …)`.

    With `config.stop`, the policy also decides after each pick whether to end: with
    \\( h = \) `stop_logit(state)`, the next pick is made with probability \\( \sigma(-h) \\).
    """

    config: SelectorConfig
    config_class: type[SelectorConfig] = SelectorConfig
    base_model_prefix = "selector"
    main_input_name = "query_embeds"
    accepts_loss_kwargs = False  # the trainer must not take `**kwargs` of `forward` for the loss's
    _supports_sdpa = True

    def __init__(self, config: SelectorConfig):
        super().__init__(config)
        self.prior = SimilarityPrior(config) if config.similarity_prior else None
        self.stop_head = nn.Linear(config.hidden_dim, 1) if config.stop else None

    def get_input_embeddings(self) -> Any:
        """None: a selector reads no tokens. FSDP2 asks, as it shards embeddings of tokens apart."""
        return None

    # ---- what a kind of selector defines ----

    def encode_candidates(self, candidate_embeds: torch.Tensor) -> CandidateEncoding:
        """
        What a selector computes of candidates alone. That of shared candidates can be kept, and given in their place
        as long as the weights stay the same.

        Args:
            candidate_embeds (`torch.Tensor` of shape `(B, K, D_c)` or `(U, D_c)`):
                As in [`~SelectorModel.forward`].
        """
        embeds = candidate_embeds.to(self.dtype)
        return CandidateEncoding(embeds, {} if self.prior is None else self.prior.candidate_vectors(embeds))

    def encode(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor | CandidateEncoding,
        candidate_mask: torch.Tensor | None = None,
        candidate_indices: torch.Tensor | None = None,
    ) -> PoolEncoding:
        """
        Encodes queries and pools; arguments as in [`~SelectorModel.forward`].

        Returns:
            `PoolEncoding`: What all sequences of a query share.
        """
        raise NotImplementedError

    def step_logits(self, encoding: Any, state: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        """Logits (B, G, K) of the next pick after `picks` (B, G, t); (B, 1, K) will do for the first."""
        raise NotImplementedError

    def advance(self, encoding: Any, state: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        """The state (B, G, …) after `pick` (B, G); `state` may be (B, 1, …) before the first."""
        raise NotImplementedError

    def teacher_forced(self, encoding: Any, picks: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        States (B, G, …) and logits (B, G, K) of all steps of given sequences, t + 1 of each for `picks` (B, G, t); the
        first of each may be (B, 1, …). Kinds of selectors may do here at once what the three methods do step by step;
        whoever overrides one of the three then overrides this too.
        """
        state, states, logits = encoding.state, [], []
        for step in range(picks.shape[-1] + 1):
            if step:
                state = self.advance(encoding, state, picks[..., step - 1])
            states.append(state)
            logits.append(self.step_logits(encoding, state, picks[..., :step]))
        return states, logits

    def stop_features(self, state: torch.Tensor) -> torch.Tensor:
        """What the decision to stop is made by, (B, G, H)."""
        return state

    # ---- the policy ----

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, mean=0.0, std=module.in_features**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SimilarityPrior):
            module.reset_parameters()

    def check_inputs(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor | CandidateEncoding,
        candidate_mask: torch.Tensor | None,
        candidate_indices: torch.Tensor | None,
    ) -> Pools:
        """Inputs in one form, with the prior's part; raises `ValueError` where they do not fit each other."""
        batch = query_embeds.shape[0]
        given = candidate_embeds
        embeds = given.embeds if isinstance(given, CandidateEncoding) else given
        check_pools(self.config, query_embeds, embeds, candidate_mask, candidate_indices)
        query_embeds = query_embeds.to(self.dtype)
        if embeds.dim() == 3 and candidate_mask is not None:
            # a masked value that overflows would still reach the weights' gradient, as 0 · inf
            embeds = embeds.masked_fill(~candidate_mask.bool().unsqueeze(-1), 0.0)
        if candidate_mask is None:
            pool = embeds.shape[-2] if candidate_indices is None else candidate_indices.shape[1]
            mask, attendable = query_embeds.new_ones(batch, pool, dtype=torch.bool), None
        else:
            mask = candidate_mask.bool()
            # a query without candidates (padding of a batch) attends to anything: its steps are masked by the caller
            attendable = mask | ~mask.any(-1, keepdim=True)
        asked = None if self.prior is None else self.prior.query_vectors(query_embeds)
        candidates = given if isinstance(given, CandidateEncoding) else self.encode_candidates(embeds)
        prior = None
        if self.prior is not None and asked is not None:
            prior = self.prior.encode(asked, candidates.vectors, attendable, candidate_indices)
        return Pools(query_embeds, candidates, candidate_indices, mask, attendable, prior)

    def _step_log_probs(
        self,
        logits: torch.Tensor,  # (B, G, K); G may be 1 before the first pick
        state: torch.Tensor,  # (B, G, …)
        available: torch.Tensor,  # (B, G, K)
        temperature: float,
        may_stop: bool,
    ) -> torch.Tensor:
        """The distribution (B, G, A) of the next step."""
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        # where nothing is left (padded steps) the distribution is that of the whole pool: finite, and masked later
        left = available.any(-1, keepdim=True)
        logits = logits if temperature == 1.0 else logits / temperature
        log_probs = torch.log_softmax(logits.masked_fill(~available & left, -math.inf), dim=-1)
        if self.stop_head is None:
            return log_probs
        if not may_stop:
            return F.pad(log_probs, (0, 1), value=-math.inf)
        more = -self.stop_head(self.stop_features(state)).to(log_probs.dtype) / temperature  # (B, G, 1)
        more = torch.where(left, more, -1e4)  # nothing is left to pick: stop
        return torch.cat([log_probs + F.logsigmoid(more), F.logsigmoid(-more)], dim=-1)

    def forward(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor | CandidateEncoding,
        candidate_mask: torch.Tensor | None = None,
        sequences: torch.Tensor | None = None,
        sequence_mask: torch.Tensor | None = None,
        candidate_indices: torch.Tensor | None = None,
        temperature: float = 1.0,
        return_step_log_probs: bool = False,
        **kwargs,
    ) -> SelectorOutput:
        r"""
        Log-probabilities of given sequences, teacher-forced in one batched pass.

        Args:
            query_embeds (`torch.Tensor` of shape `(B, D_q)`):
                Query embeddings, the features of `config.query_features` side by side.
            candidate_embeds (`torch.Tensor` of shape `(B, K, D_c)` or `(U, D_c)`):
                Embeddings of each query's pool, or of U candidates that the queries share. What
                [`~SelectorModel.encode_candidates`] makes of them will do too.
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
            [`SelectorOutput`]: A sequence that repeats a candidate or picks a padded one has log-probability `-inf`.

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
        pool = encoding.available.shape[-1]
        mask = torch.ones_like(sequences, dtype=torch.bool) if sequence_mask is None else sequence_mask.bool()
        actions = sequences
        if self.stop_head is not None:
            actions, mask = self._with_stops(sequences, mask, pool)

        steps, available = actions.shape[-1], encoding.available
        states, logits = self.teacher_forced(encoding, sequences[..., : steps - 1]) if steps else ([], [])
        log_probs, step_log_probs = [], []
        for step in range(steps):
            if step:
                available = _without(available, sequences[..., step - 1])
            # one demonstration at least: the first step is no stop
            distribution = self._step_log_probs(logits[step], states[step], available, temperature, step > 0)
            distribution = distribution.expand(-1, group, -1)  # the first step is the same for all sequences
            log_prob = distribution.gather(-1, actions[..., step : step + 1]).squeeze(-1)  # (B, G)
            log_probs.append(torch.where(mask[..., step], log_prob, 0.0))
            if return_step_log_probs:
                step_log_probs.append(distribution)
        empty = encoding.state.new_zeros(batch, group, 0)
        return SelectorOutput(
            log_probs=torch.stack(log_probs, dim=-1) if log_probs else empty,
            step_mask=mask,
            step_log_probs=(
                torch.stack(step_log_probs, dim=2) if step_log_probs else empty.unsqueeze(-1).expand(-1, -1, -1, pool)
            )
            if return_step_log_probs
            else None,
        )

    def _with_stops(self, sequences: torch.Tensor, mask: torch.Tensor, pool: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions and their mask, (B, G, S + 1) each: the picks, and the stop (number `pool`) behind short ones."""
        lengths = mask.sum(-1, keepdim=True)  # (B, G, 1)
        ends = torch.arange(sequences.shape[-1] + 1, device=sequences.device) == lengths  # (B, G, S + 1)
        ends &= (lengths > 0) & (lengths < self.config.max_shots)
        return F.pad(sequences, (0, 1)).masked_fill(ends, pool), F.pad(mask, (0, 1)) | ends

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        # the one place that `push_to_hub` has for a card of our own, in the same commit
        card = Path(working_dir, "README.md")
        if card.exists() and "[More Information Needed]" in card.read_text(encoding="utf-8"):  # nobody's yet
            from ..hub.cards import selector_card

            try:
                selector_card(working_dir, repo_id).save(card)
            except Exception:
                logger.warning("The model card could not be written; the selector goes without.", exc_info=True)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    @torch.no_grad()
    def select(
        self,
        query_embeds: torch.Tensor,
        candidate_embeds: torch.Tensor | CandidateEncoding,
        candidate_mask: torch.Tensor | None = None,
        num_shots: int = 2,
        candidate_indices: torch.Tensor | None = None,
        min_shots: int = 1,
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
                As in [`~SelectorModel.forward`].
            num_shots (`int`, *optional*, defaults to `2`):
                Number S of demonstrations, with `config.stop` the most; at most the number of candidates of the
                smallest pool.
            min_shots (`int`, *optional*, defaults to `1`):
                With `config.stop`, the fewest: before, the policy is not asked whether to stop.
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
        masked = batch and candidate_mask is not None
        smallest = int(encoding.available.sum(-1).min()) if masked else pool
        if num_shots > smallest:
            raise ValueError(
                f"num_shots={num_shots} is more than the {smallest} candidates of the smallest pool, and no candidate "
                "is picked twice; lower num_shots or enlarge the pools."
            )

        if self.config.stop and num_shots > self.config.max_shots:
            raise ValueError(
                f"num_shots={num_shots} demonstrations are more than max_shots={self.config.max_shots}, at which "
                "every sequence of this selector ends; lower num_shots."
            )

        width = returned if do_sample else num_beams
        state = encoding.state.expand(-1, width, *encoding.state.shape[2:])
        available = encoding.available.expand(-1, width, -1)
        sequences = torch.empty(batch, width, 0, dtype=torch.long, device=available.device)
        scores = torch.zeros(batch, width, device=available.device)
        ended = torch.zeros(batch, width, dtype=torch.bool, device=available.device)
        if not do_sample and width > 1:
            scores[:, 1:] = -math.inf  # all beams are equal before the first pick: keep one
        for step in range(num_shots):
            picks = sequences if self.stop_head is None else sequences.clamp(min=0)
            logits = self.step_logits(encoding, state, picks)
            may_stop = step >= max(1, min_shots)
            distribution = self._step_log_probs(logits, state, available, temperature, may_stop)
            if step == 0 and (broken := distribution.isnan()).any():  # the highest would be NaN
                raise ValueError(
                    f"query {int(broken.nonzero()[0, 0])} of the batch has log-probabilities that are NaN: embeddings "
                    "and weights must be finite; EmbeddingStore.check_finite names rows that are not."
                )
            if self.stop_head is not None:
                distribution = _decide_to_stop(distribution, ended, greedy=width == 1 and not do_sample)
            actions = distribution.shape[-1]
            if do_sample:
                pick = torch.multinomial(distribution.exp().flatten(0, 1), 1, generator=generator).view(batch, width)
                scores = scores + distribution.gather(-1, pick.unsqueeze(-1)).squeeze(-1)
            else:
                total = (scores.unsqueeze(-1) + distribution).flatten(1)  # (B, R * A)
                scores, best = total.topk(min(width, total.shape[1]), dim=-1)
                pick = best
                if width > 1:  # of one beam there is nothing to pad or to reorder
                    scores = F.pad(scores, (0, width - scores.shape[1]), value=-math.inf)
                    best = F.pad(best, (0, width - best.shape[1]))
                    parent, pick = best // actions, best % actions
                    state, available, sequences, ended = (
                        x.take_along_dim(_like(parent, x), 1) for x in (state, available, sequences, ended)
                    )
            shown = pick
            if self.stop_head is not None:
                ended = ended | (pick == pool)
                shown, pick = pick.masked_fill(ended, -1), pick.masked_fill(ended, 0)
            sequences = torch.cat([sequences, shown.unsqueeze(-1)], dim=-1)
            if step + 1 < num_shots:
                state, available = self.advance(encoding, state, pick), _without(available, pick)
        if do_sample:  # what a search found is sorted
            scores, order = scores.sort(dim=-1, descending=True, stable=True)
            sequences = sequences.gather(1, order.unsqueeze(-1).expand(-1, -1, num_shots))
        return SelectionOutput(sequences=sequences[:, :returned], scores=scores[:, :returned])


def _decide_to_stop(distribution: torch.Tensor, ended: torch.Tensor, greedy: bool) -> torch.Tensor:
    """
    The distribution (B, R, K + 1) with what has `ended` (B, R) staying so. Greedy decoding asks first whether to stop,
    then what to pick: a stop that is less probable than not must not win against many candidates.
    """
    picks, stop = distribution[..., :-1], distribution[..., -1:]
    stop = stop.masked_fill(ended.unsqueeze(-1), 0.0)
    stops = stop > math.log(0.5) if greedy else ended.unsqueeze(-1)
    if greedy:
        stop = stop.masked_fill(~stops, -math.inf)
    return torch.cat([picks.masked_fill(stops, -math.inf), stop], dim=-1)


def _without(available: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
    """What is left (B, G, K) after `pick` (B, G)."""
    return available.expand(*pick.shape, -1).scatter(-1, pick.unsqueeze(-1), False)


def _like(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`index` (B, G) with as many dimensions as `x`."""
    return index.view(*index.shape, *[1] * (x.dim() - 2))
