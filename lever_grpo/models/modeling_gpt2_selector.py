"""The GPT-2 selector: a small GPT-2 that reads the query and the picks so far."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import GPT2Config, GPT2Model
from transformers import initialization as init

from .configuration_gpt2_selector import GPT2SelectorConfig
from .layers import take_rows
from .modeling_selector import PoolEncoding, SelectorModel


@dataclass
class GPT2Encoding(PoolEncoding):
    """What a GPT-2 selector computes once per query."""

    inputs: torch.Tensor  # (B, K, H) what GPT-2 reads of a candidate that was picked
    outputs: torch.Tensor  # (B, K, H) what its hidden state is compared with


class GPT2Selector(SelectorModel):
    r"""
    Lever-LM (Yang et al., 2024): a small GPT-2 over the sequence of a beginning, the query and the picks,

    $$ h_t = \operatorname{GPT2}(b,\; u + W q,\; V a_1,\; \dots,\; V a_{t-1}), \quad
       \pi(y \mid q) = \prod_{t=1}^{S} \operatorname{softmax}_{c \notin a_{<t}} \left(
       \frac{\langle h_t, U c \rangle}{\sqrt{H}} + \text{prior}_t(c) \right)_{a_t} $$

    with learned vectors b and u. Lever-LM has an embedding of each candidate's id in the places of Vc and Uc. Here
    they are linear in its features, so that candidates may be new; a feature can hold such embeddings of ids.

    The picks of given sequences are read in one causal pass; `select` caches nothing between its steps, so GPT-2 reads
    the sequence anew after each pick. Projections of queries and candidates are computed once per query.

    Args:
        config ([`GPT2SelectorConfig`]):
            What the selector is made of.

    Example:

    ```python
    >>> import torch
    >>> from lever_grpo.models import GPT2Selector, GPT2SelectorConfig

    >>> selector = GPT2Selector(GPT2SelectorConfig(embed_dim=8, hidden_dim=16)).eval()
    >>> query, pool = torch.randn(2, 8), torch.randn(2, 5, 8)
    >>> picks = selector.select(query_embeds=query, candidate_embeds=pool, num_shots=3)
    >>> picks.sequences.shape
    torch.Size([2, 1, 3])
    >>> output = selector(query_embeds=query, candidate_embeds=pool, sequences=picks.sequences)
    >>> torch.allclose(output.log_probs.sum(-1), picks.scores, atol=1e-5)
    True

    ```
    """

    config: GPT2SelectorConfig
    config_class = GPT2SelectorConfig
    _no_split_modules = ["GPT2Block"]

    def __init__(self, config: GPT2SelectorConfig):
        super().__init__(config)
        width = config.hidden_dim
        self.query_proj = nn.Linear(sum(config.query_features.values()), width)
        candidate_width = sum(config.candidate_features.values())
        self.candidate_in = nn.Linear(candidate_width, width, bias=False)
        self.candidate_out = nn.Linear(candidate_width, width, bias=False)
        self.gpt2 = GPT2Model(
            GPT2Config(
                vocab_size=2,  # the beginning and the query
                n_positions=config.max_shots + 2,
                n_embd=width,
                n_layer=config.num_layers,
                n_head=config.num_attention_heads,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                bos_token_id=0,
                eos_token_id=None,
            )
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # GPT-2's own modules are initialised by GPT-2
        if module is self.candidate_out and self.prior is not None:
            # the correction starts at zero, so that the untrained selector is the similarity baseline
            init.zeros_(module.weight)

    def encode(self, query_embeds, candidate_embeds, candidate_mask=None, candidate_indices=None) -> GPT2Encoding:
        pools = self.check_inputs(query_embeds, candidate_embeds, candidate_mask, candidate_indices)
        query = self.query_proj(pools.query_embeds)  # (B, H)
        first, second = self.gpt2.wte(torch.arange(2, device=query.device))
        inputs = torch.stack([first.expand_as(query), second + query], dim=1).unsqueeze(1)  # (B, 1, 2, H)
        return GPT2Encoding(
            self._read(inputs),
            pools.mask.unsqueeze(1),
            pools.prior,
            pools.gather(self.candidate_in(pools.candidate_embeds)),
            pools.gather(self.candidate_out(pools.candidate_embeds)),
        )

    def _read(self, inputs: torch.Tensor) -> torch.Tensor:
        """The state (B, G, t + 1, H): the sequence (B, G, t, H) and, behind it, the last hidden state of GPT-2."""
        if not inputs.numel():  # GPT-2 takes no empty batch
            return torch.cat([inputs, inputs[:, :, -1:]], dim=2)
        hidden = self.gpt2(inputs_embeds=inputs.flatten(0, 1), use_cache=False).last_hidden_state[:, -1:]
        return torch.cat([inputs, hidden.unflatten(0, inputs.shape[:2])], dim=2)

    def stop_features(self, state: torch.Tensor) -> torch.Tensor:
        return state[:, :, -1]

    def step_logits(self, encoding: GPT2Encoding, state: torch.Tensor, picks: torch.Tensor) -> torch.Tensor:
        if not self.config.stop:  # otherwise it may be the decision to stop that is asked for
            self._check_length(picks.shape[-1] + 1)
        logits = state[:, :, -1] @ encoding.outputs.transpose(1, 2)  # (B, G, K)
        if self.config.scale_logits:
            logits = logits / math.sqrt(self.config.hidden_dim)
        return logits if self.prior is None else logits + self.prior(encoding.prior, picks)

    def advance(self, encoding: GPT2Encoding, state: torch.Tensor, pick: torch.Tensor) -> torch.Tensor:
        inputs = state[:, :, :-1].expand(-1, pick.shape[1], -1, -1)  # (B, G, t, H)
        self._check_length(inputs.shape[2] - 1)
        picked = take_rows(encoding.inputs, pick)  # (B, G, H)
        return self._read(torch.cat([inputs, picked.unsqueeze(2)], dim=2))

    def teacher_forced(
        self, encoding: GPT2Encoding, picks: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        batch, group, count = picks.shape
        if not picks.numel():
            return super().teacher_forced(encoding, picks)
        self._check_length(count if self.config.stop else count + 1)
        start = encoding.state[:, :, :-1].expand(-1, group, -1, -1)  # (B, G, 2, H)
        inputs = torch.cat([start, take_rows(encoding.inputs, picks)], dim=2).flatten(0, 1)
        # one causal pass: what is read at each pick is the state of the step behind it
        hidden = self.gpt2(inputs_embeds=inputs, use_cache=False).last_hidden_state[:, 2:]  # (B * G, t, H)
        states = [encoding.state, *(state.unsqueeze(2) for state in hidden.unflatten(0, (batch, group)).unbind(2))]
        return states, [self.step_logits(encoding, state, picks[..., :step]) for step, state in enumerate(states)]

    def _check_length(self, shots: int) -> None:
        if shots > self.config.max_shots:
            raise ValueError(
                f"{shots} demonstrations are more than max_shots={self.config.max_shots}, the most that the selector "
                "has position embeddings for; use shorter sequences, or train one with a larger max_shots."
            )
