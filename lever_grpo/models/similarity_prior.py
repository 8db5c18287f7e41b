"""The similarity prior: logits that start at the scaled cosine of the given embeddings."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_pointer_selector import PointerSelectorConfig


@dataclass
class PriorEncoding:
    """What the prior computes once per query."""

    cosines: torch.Tensor  # (B, K, P) of each pair of features
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
    Logits \\( s_t \sum_p m_{t,p} \cos(\tilde q_p, \tilde c_p)
    + s_t \sum_{j<t} \sum_f w_f \cos(\tilde a_{j,f}, \tilde c_f) \\).

    Pairs p of features are mixed by learned weights m (at the start those of `config.prior_pairs`), apart for the
    first and the later picks; \\( \tilde x \\) is a learned low-rank change of the metric; w, zero at the start, says
    how much the likeness to what was picked draws or repels. Untrained, this is the similarity baseline.
    """

    def __init__(self, config: PointerSelectorConfig):
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
        self.redundancy = nn.Parameter(torch.empty(len(self.candidate_metric)))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sets every parameter to the similarity baseline."""
        for metric in [*self.query_metric.values(), *self.candidate_metric.values()]:
            if isinstance(metric, LowRankMetric):
                init.normal_(metric.down.weight, std=metric.down.in_features**-0.5)
                init.zeros_(metric.up.weight)
        init.copy_(self.mix, torch.tensor([list(self.config.prior_pairs.values())] * 2))
        init.constant_(self.log_scale, math.log(self.config.prior_scale))
        init.zeros_(self.redundancy)

    def encode(
        self,
        query_embeds: torch.Tensor,  # (B, D_q)
        candidate_embeds: torch.Tensor,  # (B, K, D_c) or (U, D_c)
        candidate_indices: torch.Tensor | None,  # (B, K)
    ) -> PriorEncoding:
        def features(embeds: torch.Tensor, widths: dict[str, int], metrics: nn.ModuleDict) -> dict[str, torch.Tensor]:
            parts = dict(zip(widths, embeds.split(list(widths.values()), dim=-1), strict=True))
            return {name: metric(parts[name]) for name, metric in metrics.items()}

        # in full precision whatever autocast says: with 8 bits, logits of 20 · cosine tie and rank falsely
        with torch.autocast(query_embeds.device.type, enabled=False):
            query = features(query_embeds, self.query_widths, self.query_metric)
            candidates = features(candidate_embeds, self.candidate_widths, self.candidate_metric)
            if candidate_indices is not None:
                candidates = {name: x[candidate_indices] for name, x in candidates.items()}  # (B, K, D)
            cosines = torch.stack(
                [(candidates[c] @ query[q].unsqueeze(-1)).squeeze(-1) for q, c in self.pairs], dim=-1
            )  # (B, K, P)
            scale = self.log_scale.exp()
            first, later = (cosines @ self.mix.T * scale).unbind(-1)  # (B, K) each
            likeness = torch.stack([x @ x.transpose(1, 2) for x in candidates.values()], dim=-1)  # (B, K, K, F)
            return PriorEncoding(cosines, first, later, scale[1] * (likeness @ self.redundancy))

    def forward(self, encoding: PriorEncoding, picks: torch.Tensor) -> torch.Tensor:
        """Logits (B, G, K) after `picks` (B, G, t); (B, 1, K) before the first."""
        batch, group, picked = picks.shape
        if picked == 0:
            return encoding.first.unsqueeze(1)
        rows = picks.flatten(1).unsqueeze(-1).expand(-1, -1, encoding.redundancy.shape[-1])  # (B, G * t, K)
        drawn = encoding.redundancy.gather(1, rows).view(batch, group, picked, -1).sum(2)  # (B, G, K)
        return encoding.later.unsqueeze(1) + drawn
