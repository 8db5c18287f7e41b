"""The similarity prior: logits that start at the scaled cosine of the given embeddings."""

import math
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_selector import SelectorConfig
from .layers import softmax_over, take_rows


GAIN = 16.0  # a power of two: multiplying and dividing by it is exact


@dataclass
class PriorEncoding:
    """What the prior computes once per query."""

    cosines: torch.Tensor  # (B, P, K) of each pair of features
    first: torch.Tensor  # (B, K) logits of the first pick
    later: torch.Tensor  # (B, K) logits of the later picks, before what was picked is taken in
    redundancy: torch.Tensor  # (B, K, K) what row j, once picked, adds to the logits of each candidate


class LowRankMetric(nn.Module):
    """x -> norm(x + U·drop(V·x)): the identity on unit vectors at the start, where U is zero."""

    def __init__(self, width: int, rank: int, dropout: float):
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x + self.up(self.dropout(self.down(x))), dim=-1)


class UnitVectors(nn.Module):
    """The given embeddings, at unit length."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=-1)


class SimilarityPrior(nn.Module):
    r"""
    Logits \\( s_t \left( \sum_p m_{t,p} \cos(\tilde q_p, \tilde c_p) + \sum_f v_f \sum_j \alpha_j \cos(\tilde c_{j,f},
    \tilde c_f) + \sum_{j<t} \sum_f w_f \cos(\tilde a_{j,f}, \tilde c_f) \right) \\).

    - Pairs p of features are mixed by learned weights m (at the start those of `config.prior_pairs`), apart for the
      first and the later picks; \\( \tilde x \\) is a learned low-rank change of the metric.
    - v lets the pool vote: a candidate gains by its likeness to the candidates j near the query,
      \\( \alpha = \operatorname{softmax}(\eta\, \text{first logits}) \\); with answers among the features this is the
      answer that the neighbours agree on.
    - w says how much the likeness to what was picked draws or repels.

    v and w are zero at the start: untrained, this is the similarity baseline. The few weights m, v and w are kept
    divided by 16, so that they move in step with the matrices under one learning rate.
    """

    def __init__(self, config: SelectorConfig):
        super().__init__()
        self.config = config
        self.pairs = [pair.split(":") for pair in config.prior_pairs]
        self.query_widths, self.candidate_widths = config.query_features, config.candidate_features

        def metric(width: int) -> nn.Module:
            rank = config.prior_rank
            return LowRankMetric(width, rank, config.prior_dropout) if rank else UnitVectors()

        self.query_metric = nn.ModuleDict({name: metric(self.query_widths[name]) for name, _ in self.pairs})
        self.candidate_metric = nn.ModuleDict({name: metric(self.candidate_widths[name]) for _, name in self.pairs})
        self.mix = nn.Parameter(torch.empty(2, len(self.pairs)))  # first pick, later picks
        self.log_scale = nn.Parameter(torch.empty(2))
        self.agreement = nn.Parameter(torch.empty(len(self.candidate_metric)))
        self.log_sharpness = nn.Parameter(torch.empty(1))  # FSDP2 refuses weights without a dimension
        self.redundancy = nn.Parameter(torch.empty(len(self.candidate_metric)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets every parameter to the similarity baseline."""
        for metric in [*self.query_metric.values(), *self.candidate_metric.values()]:
            if isinstance(metric, LowRankMetric):
                init.normal_(metric.down.weight, std=metric.down.in_features**-0.5)
                init.zeros_(metric.up.weight)
        init.copy_(self.mix, torch.tensor([list(self.config.prior_pairs.values())] * 2) / GAIN)
        init.constant_(self.log_scale, math.log(self.config.prior_scale))
        init.zeros_(self.agreement)
        init.zeros_(self.log_sharpness)
        init.zeros_(self.redundancy)

    def query_vectors(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unit vectors of each of the queries' features under the learned metric."""
        return self._vectors(embeds, self.query_widths, self.query_metric)

    def candidate_vectors(self, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """Unit vectors of each of the candidates' features under the learned metric."""
        return self._vectors(embeds, self.candidate_widths, self.candidate_metric)

    def _vectors(
        self, embeds: torch.Tensor, widths: dict[str, int], metrics: nn.ModuleDict
    ) -> dict[str, torch.Tensor]:
        # in full precision whatever autocast says: with 8 bits, logits of 20 · cosine tie and rank falsely
        with torch.autocast(embeds.device.type, enabled=False):
            parts = dict(zip(widths, embeds.split(list(widths.values()), dim=-1), strict=True))
            return {name: metric(parts[name]) for name, metric in metrics.items()}

    def pair_logits(self, query_embeds: torch.Tensor, candidate_embeds: torch.Tensor) -> torch.Tensor:
        """
        Logits of every candidate (M, D_c) for every query (N, D_q) by their cosines alone, without what depends on a
        pool: (2, N, M), the first pick and the later ones.
        """
        query, candidates = self.query_vectors(query_embeds), self.candidate_vectors(candidate_embeds)
        cosines = torch.stack([query[q] @ candidates[c].T for q, c in self.pairs], dim=-1)  # (N, M, P)
        return (GAIN * cosines @ self.mix.T * self.log_scale.exp()).permute(2, 0, 1)

    def encode(
        self,
        query: dict[str, torch.Tensor],  # of `query_vectors`, (B, D)
        candidates: dict[str, torch.Tensor],  # of `candidate_vectors`, (B, K, D) or (U, D)
        candidate_mask: torch.Tensor | None,  # (B, K), at least one candidate each
        candidate_indices: torch.Tensor | None,  # (B, K)
    ) -> PriorEncoding:
        with torch.autocast(self.mix.device.type, enabled=False):  # as above
            batch = len(next(iter(query.values())))
            candidates = {
                name: x.expand(batch, -1, -1) if candidate_indices is None else F.embedding(candidate_indices, x)
                for name, x in candidates.items()
            }  # (B, K, D)
            cosines = torch.cat(
                [query[q].unsqueeze(1) @ candidates[c].transpose(1, 2) for q, c in self.pairs], dim=1
            )  # (B, P, K)
            scale = self.log_scale.exp().unsqueeze(-1)
            logits = (GAIN * scale * self.mix) @ cosines  # (B, 2, K): first pick, later picks
            share = softmax_over(self.log_sharpness.exp() * logits[:, :1], candidate_mask)  # (B, 1, K)
            likeness = [x @ x.transpose(1, 2) for x in candidates.values()]  # (B, K, K) each
            votes = self._weighted(self.agreement, [share @ part for part in likeness])  # (B, 1, K)
            first, later = (logits + scale * votes).unbind(1)  # (B, K) each
            return PriorEncoding(cosines, first, later, self._weighted(scale[1] * self.redundancy, likeness))

    def _weighted(self, weights: torch.Tensor, parts: list[torch.Tensor]) -> torch.Tensor:
        """Sum of what there is of each of the candidates' features, times its weight."""
        return reduce(add, (weight * part for weight, part in zip(GAIN * weights, parts, strict=True)))

    def forward(self, encoding: PriorEncoding, picks: torch.Tensor) -> torch.Tensor:
        """Logits (B, G, K) after `picks` (B, G, t); (B, 1, K) before the first."""
        if not picks.shape[-1]:
            return encoding.first.unsqueeze(1)
        return encoding.later.unsqueeze(1) + take_rows(encoding.redundancy, picks).sum(2)
