"""Each option of the decoder learns a signal that was planted for it, which the preset without it misses."""

import re
from pathlib import Path

import pytest
import torch

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.models.decoder_terms import TERMS


WIDTH, POOL = 12, 4


def unit(*shape):
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def signs(*shape):
    return torch.randint(0, 2, shape) * 2.0 - 1.0


def orthonormal(queries, vectors):
    frames = torch.linalg.qr(torch.randn(queries, WIDTH, vectors)).Q.transpose(1, 2)  # (B, V, D)
    return frames * signs(queries, vectors, 1)  # those of QR would tell which vector is which


def with_pool(query, picks, right, wrong):
    """The picks stand first in the pool, and the right candidate after them, before or behind the wrong one."""
    first = torch.rand(len(query), 1) < 0.5
    last = torch.where(first[..., None], torch.stack([right, wrong], 1), torch.stack([wrong, right], 1))
    pool = torch.cat([picks, last], dim=1)
    target = picks.shape[1] + (~first[:, 0]).long()
    return query, pool, torch.cat([torch.arange(picks.shape[1]).expand(len(query), -1), target[:, None]], dim=1)


def unlike_either_pick(queries):
    """Wrong: near one pick and opposite to the other. Summed over the picks, both are alike."""
    a, b, rest = orthonormal(queries, 3).unbind(1)
    side = signs(queries, 1)
    wrong = 0.7 * side * (a - b)
    right = 0.1 * signs(queries, 1) * (a + b) + rest
    return with_pool(unit(queries, WIDTH), torch.stack([a, b], 1), right, wrong)


def outside_the_span(queries):
    """Wrong: a mixture of both picks with any signs, the likeness of which to one of them may be far below zero."""
    a, b, rest = orthonormal(queries, 3).unbind(1)
    wrong = (signs(queries, 1) * a + signs(queries, 1) * b) / 2**0.5
    return with_pool(unit(queries, WIDTH), torch.stack([a, b], 1), rest * signs(queries, 1), wrong)


def not_covered_yet(queries):
    """
    Topics that the query needs are covered by no pick, one or both. Right: one of the first and one of the last;
    wrong: two of those in the middle. By counts, both are alike.
    """
    order = torch.rand(queries, WIDTH).argsort(1)
    topic = torch.eye(WIDTH)[order]  # (B, D, D)
    fresh, left, right, both = topic[:, 0], topic[:, 1], topic[:, 2], topic[:, 3]
    needs = fresh + left + right + both
    return with_pool(needs, torch.stack([left + both, right + both], 1), fresh + both, left + right)


def by_parity(queries):
    """
    Right: what bears the sign of the product of the picks' marks. Beside the large constant, marks hardly change the
    length of a vector, by which layer norms would find a part of it.
    """
    picks = 0.3 * torch.randn(queries, 3, WIDTH)
    picks[..., 0], picks[..., 1] = signs(queries, 3), 0.0
    right, wrong = 0.3 * torch.randn(2, queries, WIDTH)
    right[:, 0] = wrong[:, 0] = 0.0
    right[:, 1] = picks[..., 0].prod(1)
    wrong[:, 1] = -right[:, 1]
    picks[..., 2], right[:, 2], wrong[:, 2] = 2.0, 2.0, 2.0
    return with_pool(0.3 * unit(queries, WIDTH), picks, right, wrong)


def by_a_product(queries):
    """Right: the product of two of its numbers has the query's sign."""
    sign = signs(queries)
    query, right, wrong = torch.randn(3, queries, WIDTH)
    query = 0.3 * query
    query[:, 0] = sign
    for candidate, wanted in ((right, sign), (wrong, -sign)):
        candidate[:, 1] = candidate[:, 1].abs() * candidate[:, 0].sign() * wanted
    return with_pool(query, 0.3 * torch.randn(queries, 2, WIDTH), right, wrong)


def without_a_twin(queries):
    """Right, and the first pick: the one candidate that is like no other of the pool."""
    twin, lone = unit(2, queries, WIDTH)
    pool = torch.stack([twin, twin, lone], 1) + 0.1 * torch.randn(queries, 3, WIDTH)
    order = torch.rand(queries, 3).argsort(1)
    target = (order == 2).long().argmax(1, keepdim=True)
    return unit(queries, WIDTH), pool.take_along_dim(order[..., None], 1), target


def learned(make, steps, **options):
    """Share of new queries for which the trained selector is surer of the right last pick than of all others."""
    torch.manual_seed(0)
    config = PointerSelectorConfig.from_preset(embed_dim=WIDTH, hidden_dim=32, dropout=0.0, term_rank=16, **options)
    selector = PointerSelector(config)
    optimizer = torch.optim.Adam(selector.parameters(), lr=3e-3)

    def log_probs(queries):
        query, pool, sequence = make(queries)
        inputs = {"query_embeds": query, "candidate_embeds": pool, "sequences": sequence[:, None]}
        return selector(**inputs).log_probs[:, 0, -1]

    for _ in range(steps):
        loss = -log_probs(128).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (log_probs(1000) > -0.6931).float().mean().item()


@pytest.mark.parametrize(
    "task, preset, option, steps",
    [
        (unlike_either_pick, "v1", {"decoder_terms": ["mmr"]}, 400),
        (outside_the_span, "v2", {"decoder_terms": ["dpp"]}, 300),
        (not_covered_yet, "v1", {"decoder_terms": ["coverage"]}, 300),
        (by_parity, "v1", {"state_update": "gru"}, 400),
        (by_a_product, "v1", {"scoring": "additive"}, 500),
        (without_a_twin, "v1", {"num_set_layers": 1}, 500),
    ],
    ids=["mmr", "dpp", "coverage", "gru", "additive", "set"],
)
def test_an_option_learns_what_the_preset_without_it_misses(task, preset, option, steps):
    without, with_it = (learned(task, steps, preset=preset, **options) for options in ({}, option))
    assert with_it > 0.95 and without < 0.8, (without, with_it)


@pytest.mark.parametrize("preset", ["v1", "v2", "v3"])
def test_a_preset_has_no_weights_of_options(preset):
    """Its function is in `test_forward.py`: by the formulas, and by hand."""
    names = PointerSelector(PointerSelectorConfig.from_preset(preset, embed_dim=WIDTH, hidden_dim=16)).state_dict()
    linear = ["query_proj", "candidate_proj", "query_norm", "candidate_norm", "state_update.norm"]
    expected = {f"{name}.{part}" for name in linear for part in ("weight", "bias")}
    expected |= {"state_update.from_state.weight", "state_update.from_state.bias", "state_update.from_pick.weight"}
    expected |= {"pointer.state_proj.weight"}
    parts = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "attention_norm", "output_norm"]
    if preset != "v1":
        expected |= {f"layers.0.{name}.{part}" for name in parts for part in ("weight", "bias")}
    assert set(names) == expected


@pytest.mark.parametrize("preset", ["v1", "v2", "v3"])
@pytest.mark.parametrize("option", ["mmr", "coverage", "dpp", "stop", "gru"])
def test_an_option_at_its_zero_is_the_preset(preset, option):
    """The weights that are not the option's own give the preset's numbers, and others once the option acts."""
    options = {"stop": {"stop": True}, "gru": {"state_update": "gru"}}.get(option, {"decoder_terms": [option]})
    plain = {"state_update": "gated"} if option == "gru" else {}
    configs = [
        PointerSelectorConfig.from_preset(preset, **{"embed_dim": WIDTH, "hidden_dim": 16, **changes})
        for changes in (options, plain)
    ]
    selector, without = (PointerSelector(config).eval() for config in configs)
    weights = dict(selector.state_dict())
    with torch.no_grad():
        for weight in weights.values():  # away from where they start
            weight.add_(0.3 * torch.randn_like(weight))
        if option == "gru":  # nothing is forgotten by the reset gate: its share of the rows goes
            own = [selector.state_update.from_state.weight[:16], selector.state_update.from_pick.weight[:16]]
            switch, off, on = selector.state_update.from_state.bias[:16], 1e4, 0.0
        elif option == "stop":  # it is never asked for
            own, switch, off, on = [selector.stop_head.weight], selector.stop_head.bias, -1e4, 0.0
        else:
            own, switch, off, on = [], selector.terms[option].weight, 0.0, 1.0
        for weight in own:
            weight.zero_()
        switch.fill_(off)
    kept = {name: weight for name, weight in weights.items() if not name.startswith(("terms.", "stop_head."))}
    if option == "gru":
        kept |= {name: weight[16:] for name, weight in kept.items() if name.startswith("state_update.from_")}
    without.load_state_dict(kept)
    batch = not_covered_yet(8)
    expected = log_probs_of(without, batch)
    close = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(log_probs_of(selector, batch)[..., :3], expected, **close)
    with torch.no_grad():
        switch.fill_(on)
    assert not torch.allclose(log_probs_of(selector, batch)[..., :3], expected, atol=1e-3)


@pytest.mark.parametrize("term", ["mmr", "coverage", "dpp"])
def test_a_term_starts_at_zero(term):
    selector = PointerSelector(PointerSelectorConfig(embed_dim=WIDTH, hidden_dim=16, decoder_terms=[term]))
    assert (selector.terms[term].weight == 0).all()


@torch.no_grad()
def log_probs_of(selector, batch):
    query, pool, sequence = batch
    return selector(query_embeds=query, candidate_embeds=pool, sequences=sequence[:, None]).log_probs


@pytest.mark.parametrize(
    "options, message",
    [
        ({"decoder_terms": ["mmr", "mmr"]}, "each once"),
        ({"decoder_terms": ["novelty"]}, "mmr, coverage, dpp"),
        ({"scoring": "cosine"}, "bilinear, additive"),
        ({"state_update": "lstm"}, "additive, gated, gru"),
        ({"term_rank": 0}, "at least 1"),
        ({"max_shots": 0}, "at least 1"),
        ({"encoder": "none", "similarity_prior": True, "stop": True}, "needs a network"),
        ({"encoder": "none", "similarity_prior": True, "decoder_terms": ["dpp"]}, "needs a network"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PointerSelectorConfig(**options)


def test_the_term_of_the_documentation_works(monkeypatch, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "selectors.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    space: dict = {}
    exec(block, space)
    monkeypatch.setitem(TERMS, "spread", space["SpreadTerm"])
    selector = PointerSelector(
        PointerSelectorConfig(embed_dim=WIDTH, hidden_dim=16, max_shots=3, decoder_terms=["spread"])
    ).eval()
    assert (selector.terms["spread"].weight == 0).all()
    with torch.no_grad():
        selector.terms["spread"].weight.fill_(2.0)
    selector.save_pretrained(tmp_path)
    batch = not_covered_yet(8)
    assert torch.equal(
        log_probs_of(PointerSelector.from_pretrained(tmp_path).eval(), batch), log_probs_of(selector, batch)
    )
