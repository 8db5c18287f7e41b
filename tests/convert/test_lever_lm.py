"""A converted Lever-LM has the original's probabilities and makes its choices."""

import logging
import math

import pytest
import torch
from transformers import AutoModel, GPT2Config, GPT2LMHeadModel

from lever_grpo.convert.lever_lm import convert_lever_lm
from lever_grpo.models import GPT2Selector


CANDIDATES, WIDTH, HEADS, QUERIES, SHOTS = 7, 12, 3, 4, 3
END, BEGINNING, QUERY = CANDIDATES, CANDIDATES + 1, CANDIDATES + 2
FLAGS = [
    (["image", "text"], []),
    (["text"], []),
    (["image"], ["text"]),
    (["text", "image"], ["image", "text"]),
]


@pytest.fixture
def lm() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=CANDIDATES + 3,
        n_embd=WIDTH,
        n_head=HEADS,
        n_layer=2,
        n_positions=20,
        eos_token_id=CANDIDATES + 3,
        bos_token_id=CANDIDATES + 4,
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def layout(lm: GPT2LMHeadModel, prefix: str = "", encoders: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    names = {f"{prefix}lm_model.{name}": value.clone() for name, value in lm.state_dict().items()}
    for encoder in encoders:
        names[f"{prefix}{encoder}.encoder.layers.0.weight"] = torch.randn(2, 2)
    return names


def features(seed: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(seed)
    return (
        {name: torch.randn(QUERIES, WIDTH) for name in ("image", "text")},
        {name: torch.randn(CANDIDATES, WIDTH) for name in ("image", "text")},
    )


def original_step(lm, query: dict, candidates: dict, flags, ids: list[int]) -> torch.Tensor:
    """Log-probabilities (N,) of the next id, for one query whose features are (H,)."""
    of_query, of_candidates = flags
    inputs = lm.transformer.wte(torch.tensor([BEGINNING, QUERY, *ids])).clone()
    for name in of_query:
        inputs[1] += query[name]
    for place, chosen in enumerate(ids, start=2):
        for name in of_candidates:
            inputs[place] += candidates[name][chosen]
    logits = lm(inputs_embeds=inputs.unsqueeze(0)).logits[0, -1]
    logits[CANDIDATES:] = -math.inf
    logits[ids] = -math.inf
    return logits.log_softmax(0)[:CANDIDATES]


def selector_inputs(query, candidates, flags, extra) -> dict[str, torch.Tensor]:
    of_query, of_candidates = flags
    return {
        "query_embeds": torch.cat([query[name] for name in of_query], dim=1),
        "candidate_embeds": torch.cat([extra["token"], *(candidates[name] for name in of_candidates)], dim=1),
    }


@torch.no_grad()
@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("prefix", ["", "lever_lm."])
def test_probabilities_and_choices_are_the_originals(lm, flags, prefix, tmp_path):
    config, weights, extra = convert_lever_lm(layout(lm, prefix), *flags, num_attention_heads=HEADS, max_shots=SHOTS)
    assert list(config.query_features) == flags[0] and list(config.candidate_features) == ["token", *flags[1]]
    assert extra["token"].shape == (CANDIDATES, WIDTH)
    selector = GPT2Selector(config)
    selector.load_state_dict(weights)  # strict: all weights, no others
    selector.save_pretrained(tmp_path)
    selector = AutoModel.from_pretrained(tmp_path)

    query, candidates = features(seed=1)
    inputs = selector_inputs(query, candidates, flags, extra)
    sequences = torch.rand(QUERIES, 5, CANDIDATES).argsort(-1)[..., :SHOTS]
    steps = selector(**inputs, sequences=sequences, return_step_log_probs=True).step_log_probs
    picks = selector.select(**inputs, num_shots=SHOTS)
    chosen_by_original = []
    for number in range(QUERIES):
        one = {name: x[number] for name, x in query.items()}
        for beam, sequence in enumerate(sequences[number].tolist()):
            for step in range(SHOTS):
                expected = original_step(lm, one, candidates, flags, sequence[:step])
                torch.testing.assert_close(steps[number, beam, step], expected, atol=1e-5, rtol=1e-5)
        ids: list[int] = []
        score = 0.0
        for _ in range(SHOTS):
            log_probs = original_step(lm, one, candidates, flags, ids)
            score += log_probs.max().item()
            ids.append(int(log_probs.argmax()))
        assert picks.sequences[number, 0].tolist() == ids
        assert picks.scores[number, 0].item() == pytest.approx(score, abs=1e-5)
        chosen_by_original.append(ids)
    assert len({tuple(ids) for ids in chosen_by_original}) > 1  # the query matters


@torch.no_grad()
def test_a_pool_of_some_candidates_has_the_originals_probabilities_among_them(lm):
    flags = (["image"], ["image"])
    config, weights, extra = convert_lever_lm(layout(lm), *flags, num_attention_heads=HEADS)
    selector = GPT2Selector(config).eval()
    selector.load_state_dict(weights)
    query, candidates = features(seed=2)
    inputs = selector_inputs(query, candidates, flags, extra)
    pool = torch.tensor([5, 0, 3])
    output = selector(
        **inputs,
        candidate_indices=pool.expand(QUERIES, -1),
        sequences=torch.tensor([[[2, 0]]]).expand(QUERIES, -1, -1),
        return_step_log_probs=True,
    )
    for number in range(QUERIES):
        one = {name: x[number] for name, x in query.items()}
        expected = original_step(lm, one, candidates, flags, [3])[pool].log_softmax(0)
        torch.testing.assert_close(output.step_log_probs[number, 0, 1], expected, atol=1e-5, rtol=1e-5)


def test_old_causal_masks_and_half_precision_are_read(lm):
    expected = convert_lever_lm(layout(lm.half()), num_attention_heads=HEADS)
    tensors = layout(lm)
    for layer in range(2):
        tensors[f"lm_model.transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 20, 20).tril()
        tensors[f"lm_model.transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    config, weights, extra = convert_lever_lm(tensors, num_attention_heads=HEADS)
    assert weights.keys() == expected[1].keys()
    assert all(torch.equal(weights[name], value) for name, value in expected[1].items())
    assert {value.dtype for value in [*weights.values(), *extra.values()]} == {torch.float32}


def test_encoders_are_left_out_and_named(lm, caplog):
    tensors = layout(lm, "lever_lm.", ("img_model", "sen_model"))
    with caplog.at_level(logging.WARNING):
        _, weights, _ = convert_lever_lm(tensors, num_attention_heads=HEADS)
    assert weights.keys() == convert_lever_lm(layout(lm), num_attention_heads=HEADS)[1].keys()
    assert "left out 2 tensors of CLIP" in caplog.text and "sen_model.encoder.layers.0.weight" in caplog.text


def test_positions_beyond_max_shots_are_cut(lm):
    config, weights, _ = convert_lever_lm(layout(lm), num_attention_heads=HEADS, max_shots=5)
    assert config.max_shots == 5 and config.scale_logits is False
    assert torch.equal(weights["gpt2.wpe.weight"], lm.transformer.wpe.weight[:7])
    assert torch.equal(weights["gpt2.wte.weight"], lm.transformer.wte.weight[[BEGINNING, QUERY]])


NAME = "lm_model.transformer."


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({f"{NAME}wte.weight": None}, {}, r"expected .* with 'lm_model.transformer.wte.weight', found lm_model"),
        ({f"{NAME}wte.weight": torch.zeros(3, WIDTH)}, {}, r"wte.weight has shape \(3, 12\); expected a row for each"),
        ({"lm_model.lm_head.weight": torch.zeros(10, WIDTH)}, {}, "lm_head.weight differs from lm_model.*wte.weight"),
        ({f"{NAME}h.1.mlp.c_fc.bias": None}, {}, "lacks lm_model.transformer.h.1.mlp.c_fc.bias"),
        ({f"{NAME}wpe.weight": None}, {}, "lacks lm_model.transformer.wpe.weight"),
        ({f"{NAME}h.0.crossattention.c_attn.bias": torch.zeros(1)}, {}, "no lm_model.transformer.h.0.crossattention"),
        ({f"{NAME}h.0.mlp.c_fc.weight": torch.zeros(12, 24)}, {}, r"c_fc.weight has shape \(12, 24\), .* \(12, 48\)"),
        ({f"{NAME}wpe.weight": torch.zeros(20, 8)}, {}, r"wpe.weight has shape \(20, 8\)"),
        ({"query_proj.weight": torch.zeros(1)}, {}, "a GPT2LeverLM has no query_proj.weight"),
        ({"img_adapter.0.weight": torch.zeros(1)}, {}, r"has adapters \(img_adapter.0.weight\)"),
        ({"img_model.w": torch.zeros(1)}, {}, r"no encoder 'sen_model.' of 'text', and one of them names it"),
        (
            {"img_model.w": torch.zeros(1), "sen_model.w": torch.zeros(1)},
            {"query_features": ["image"]},
            r"query_features=\['image'\], .* an encoder 'sen_model.' of 'text', and neither names it",
        ),
        ({}, {"query_features": []}, "query_features is empty"),
        ({}, {"query_features": "image"}, "query_features='image': must be a list of image, text"),
        ({}, {"candidate_features": ["token"]}, r"candidate_features=\['token'\]: must be a list of image, text"),
        ({}, {"candidate_features": ["text", "text"]}, "each at most once"),
        ({}, {"num_attention_heads": 8}, "hidden_dim=12 is not a multiple of num_attention_heads=8"),
        ({}, {"max_shots": 19}, "max_shots=19, but the model has 20 positions.* max_shots is at most 18"),
    ],
)
def test_what_is_no_lever_lm_is_refused(lm, change, options, message):
    tensors = {name: value for name, value in {**layout(lm), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        convert_lever_lm(tensors, **{"num_attention_heads": HEADS, **options})
