"""Post-training on the demonstrations' own answers, without a score of the frozen model."""

import copy
import math

import torch
from torch import Tensor, nn

from ..models import SelectorModel


def fit_answer_agreement(
    selector: SelectorModel,
    query_embeds: Tensor,
    candidate_embeds: Tensor,
    answer_embeds: Tensor,
    entities: Tensor | None = None,
    steps: int = 400,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    temperature: float = 0.1,
    averaging: float = 0.97,
    seed: int = 0,
) -> list[float]:
    r"""
    Fits the similarity prior of a selector, in place, so that rows pick rows with the same answer.

    Every demonstration comes with its answer, so every row of the candidate set can play a query whose right choices
    are known without asking the frozen model: the other rows whose answers agree with its own. In a batch each row is
    a query and the others are its candidates; with
    \\( r_{ij} = e^{(\cos(\text{answer}_i, \text{answer}_j) - 1) / T} \\),

    $$ L = -\sum_t \log \Big( \sum_{j \ne i} \pi_t(j \mid i)\, r_{ij} + 10^{-3} \Big), $$

    the loss of neighbourhood components analysis (Goldberger et al., 2004) with graded classes, for the logits of the
    first and of the later picks. Its gradient is a policy gradient of group-relative advantages,
    \\( A_{ij} = (r_{ij} - \bar r_i) / (\bar r_i + 10^{-3}) \\) with \\( \bar r_i = \sum_j \pi(j \mid i)\, r_{ij} \\),
    summed over the whole group instead of sampled from it. The query side never sees an answer. The weights that are
    kept are a moving average.

    Args:
        selector ([`SelectorModel`]):
            With a similarity prior.
        query_embeds (`Tensor` of shape `(N, D_q)`):
            What the query side sees of each row.
        candidate_embeds (`Tensor` of shape `(N, D_c)`):
            What the candidate side sees of each row.
        answer_embeds (`Tensor` of shape `(N, D_a)`):
            Embedding of each row's answer, at unit length.
        entities (`Tensor` of shape `(N,)`, *optional*):
            Number of the thing that each row is about: rows about one thing are not each other's candidates.
        steps (`int`, *optional*, defaults to `400`):
            Optimisation steps.
        batch_size (`int`, *optional*, defaults to `256`):
            Rows per step. Raising it gives each query more candidates.
        learning_rate (`float`, *optional*, defaults to `1e-3`):
            Peak learning rate of AdamW; 20 steps of warm-up, then a cosine.
        weight_decay (`float`, *optional*, defaults to `0.05`):
            Weight decay.
        temperature (`float`, *optional*, defaults to `0.1`):
            T of the agreement. Lower asks for equal answers, higher is content with similar ones.
        averaging (`float`, *optional*, defaults to `0.97`):
            Weight of the past in the moving average of the weights.
        seed (`int`, *optional*, defaults to `0`):
            Seed of batches and dropout.

    Returns:
        `list[float]`: the loss of every step.

    Raises:
        ValueError: if the selector has no similarity prior, or there are fewer than 2 rows.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo import PointerSelector, PointerSelectorConfig
    >>> from lever_grpo.trainer import fit_answer_agreement

    >>> rows, answers = torch.randn(64, 8), torch.eye(4).repeat(16, 1)
    >>> rows[:, :4] += answers
    >>> selector = PointerSelector(PointerSelectorConfig(embed_dim=8, encoder="none", similarity_prior=True))
    >>> losses = fit_answer_agreement(selector, rows, rows, answers, steps=50)
    >>> losses[-1] < losses[0]
    True

    ```
    """
    prior = selector.prior
    if prior is None:
        raise ValueError("answer agreement is fitted in the similarity prior; build the selector with one.")
    rows = len(query_embeds)
    if rows < 2:
        raise ValueError(f"answer agreement needs at least 2 rows, got {rows}.")
    if entities is None:
        entities = torch.arange(rows, device=query_embeds.device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=learning_rate, weight_decay=weight_decay)
    average = copy.deepcopy(prior)
    generator = torch.Generator().manual_seed(seed)
    was_training = prior.training
    prior.train()
    losses: list[float] = []
    order = torch.empty(0, dtype=torch.long)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(steps):
            if len(order) < min(batch_size, rows):
                order = torch.randperm(rows, generator=generator)
            batch, order = order[:batch_size], order[batch_size:]
            others = entities[batch].unsqueeze(1) != entities[batch]  # (b, b)
            log_probs = prior.pair_logits(query_embeds[batch], candidate_embeds[batch])  # (2, b, b)
            log_probs = log_probs.masked_fill(~others, torch.finfo(log_probs.dtype).min).log_softmax(-1)
            cosine = answer_embeds[batch] @ answer_embeds[batch].T
            agreement = torch.where(others, ((cosine - 1) / temperature).exp(), 0.0)
            loss = -((log_probs.exp() * agreement).sum(-1) + 1e-3).log().sum(0).mean()

            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            with torch.no_grad():
                for mean, current in zip(average.parameters(), prior.parameters(), strict=True):
                    mean.lerp_(current, 1 - min(averaging, (step + 1) / (step + 10)))
    prior.load_state_dict(average.state_dict())
    prior.train(was_training)
    return losses
