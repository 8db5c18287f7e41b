"""Small selectors of every kind, with weights away from their start, and batches for them."""

import torch

from lever_grpo.models import PRESETS, PointerSelector, SelectorConfig, SelectorModel, config_from_preset


# Neither features nor pairs are in alphabetical order, nor are the widths alike: a mix-up shows.
FEATURES = {
    "query_features": {"question": 4, "image": 3},
    "candidate_features": {"question": 4, "image": 3, "answer": 4},
    "prior_pairs": {"question:question": 1.0, "image:image": 0.5, "question:answer": 0.0},
}
QUERY_WIDTH, CANDIDATE_WIDTH = 7, 11
SMALL = {"hidden_dim": 8, "num_attention_heads": 2, "prior_scale": 3.0, "prior_rank": 2, **FEATURES}
VARIANTS = {
    "v0": {"preset": "v0"},
    "v0-prior": {"preset": "v0", "similarity_prior": True},
    "v1": {"preset": "v1"},
    "v2": {"preset": "v2"},
    "v3": {"preset": "v3"},
    "prior": {"preset": "v3", "encoder": "none", "similarity_prior": True},
    "v1-prior": {"preset": "v1", "similarity_prior": True},
    "v3-sets": {"preset": "v3", "num_set_layers": 1},
    "v3-prior-sets": {"preset": "v3", "similarity_prior": True, "num_set_layers": 2, "num_layers": 2},
    "gru-additive": {"preset": "v3", "state_update": "gru", "scoring": "additive"},
    "terms": {"preset": "v3", "decoder_terms": ["mmr", "coverage", "dpp"], "term_rank": 3},
    "prior-terms": {"preset": "v3", "similarity_prior": True, "decoder_terms": ["dpp"], "scoring": "additive"},
    "lever-plus-v1": {"preset": "lever-plus-v1"},
    "lever-plus-v2": {"preset": "lever-plus-v2", "pick_update": "gated", "num_layers": 2},
}
POINTER_VARIANTS = [name for name, options in VARIANTS.items() if PRESETS[options["preset"]] is PointerSelector]


def make_config(variant: str = "v3", **options) -> SelectorConfig:
    return config_from_preset(**{**SMALL, **VARIANTS[variant], **options})


def make_selector(variant: str = "v3", seed: int = 0, trained: bool = True, **options) -> SelectorModel:
    """In double precision and evaluation mode; `trained` moves every weight, also those that start at zero or one."""
    torch.manual_seed(seed)
    kind = PRESETS[VARIANTS[variant]["preset"]]
    selector = kind(make_config(variant, **options)).double().eval()
    if trained:
        with torch.no_grad():
            for name, parameter in selector.named_parameters():
                # the prior multiplies these by a gain: more noise, and every distribution is a single candidate
                small = name in ("prior.mix", "prior.agreement", "prior.redundancy")
                parameter.add_((0.03 if small else 0.5) * torch.randn_like(parameter))
    return selector


def make_batch(queries: int = 2, pool: int = 5, group: int = 3, shots: int = 3, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(queries, group, pool, generator=generator)
    return {
        "query_embeds": torch.randn(queries, QUERY_WIDTH, generator=generator, dtype=torch.float64),
        "candidate_embeds": torch.randn(queries, pool, CANDIDATE_WIDTH, generator=generator, dtype=torch.float64),
        "sequences": noise.argsort(-1)[..., :shots],
    }


def gradients(selector: SelectorModel, inputs: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of the weighted sum of log-probs, by parameter."""
    selector.zero_grad()
    (selector(**inputs).log_probs * weights).sum().backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in selector.named_parameters()
    }
