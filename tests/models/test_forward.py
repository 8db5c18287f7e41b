import itertools
import math

import pytest
import torch
from small_selectors import CANDIDATE_WIDTH, POINTER_VARIANTS, QUERY_WIDTH, gradients, make_batch, make_selector
from torch import nn
from torch.nn import functional as F

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.models.layers import Attention


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"atol": 1e-10, "rtol": 1e-8, **tolerance})


def all_sequences(pool: int, shots: int) -> torch.Tensor:
    return torch.tensor(list(itertools.permutations(range(pool), shots)))


# ---- against a reference written out for one query and one sequence at a time ----


def reference_log_probs(selector: PointerSelector, query, pool, sequence) -> list[torch.Tensor]:
    """The distribution of each step; straight from the formulas, in loops, from the weights by name."""
    config, weights = selector.config, dict(selector.named_parameters())

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return weights[f"{name}.weight"] @ x + (0 if bias is None else bias)

    def norm(name, x):
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(name, x, context):
        keys, values = (torch.stack([linear(f"{name}.{part}_proj", c) for c in context]) for part in "kv")
        size, heads = config.hidden_dim // config.num_attention_heads, []
        for head in range(config.num_attention_heads):
            part = slice(head * size, (head + 1) * size)
            scores = keys[:, part] @ linear(f"{name}.q_proj", x)[part] / math.sqrt(size)
            heads.append(scores.softmax(0) @ values[:, part])
        x = norm(f"{name}.attention_norm", x + linear(f"{name}.o_proj", torch.cat(heads)))
        return norm(f"{name}.output_norm", x + linear(f"{name}.down_proj", F.gelu(linear(f"{name}.up_proj", x))))

    def split(x, features):
        return dict(zip(features, x.split(list(features.values())), strict=True))

    def unit(x, side, name):
        metric = f"prior.{side}_metric.{name}"
        x = x + weights[f"{metric}.up.weight"] @ weights[f"{metric}.down.weight"] @ x
        return x / x.norm()

    network = config.encoder != "none"
    if network:
        state = norm("query_norm", linear("query_proj", query))
        candidates = [norm("candidate_norm", linear("candidate_proj", c)) for c in pool]
    if config.similarity_prior:
        pairs = [pair.split(":") for pair in config.prior_pairs]
        asked = split(query, config.query_features)
        held = [split(c, config.candidate_features) for c in pool]
        cosines = torch.stack(
            [torch.stack([unit(asked[q], "query", q) @ unit(x[c], "candidate", c) for q, c in pairs]) for x in held]
        )
        compared = list(dict.fromkeys(c for _, c in pairs))
        units = [torch.stack([unit(x[name], "candidate", name) for x in held]) for name in compared]
        likeness = torch.stack([x @ x.T for x in units], dim=-1)  # (K, K, F)
        scale = weights["prior.log_scale"].exp()
        mixed = scale * (16 * cosines @ weights["prior.mix"].T)  # (K, 2)
        near = (weights["prior.log_sharpness"].exp() * mixed[:, 0]).softmax(0)
        votes = sum(share * row @ (16 * weights["prior.agreement"]) for share, row in zip(near, likeness, strict=True))
        mixed = mixed + scale * votes.unsqueeze(1)
    if config.num_set_layers:
        candidates = [c + state for c in candidates]
        if config.similarity_prior:
            relations = torch.cat([(mixed[:, 0] - mixed[:, 0].mean()).unsqueeze(1), 5 * cosines], dim=1)
            candidates = [c + linear("relation_proj", r) for c, r in zip(candidates, relations, strict=True)]
        for layer in range(config.num_set_layers):
            candidates = [attention(f"set_layers.{layer}", c, candidates) for c in candidates]
    for layer in range(config.num_layers if config.encoder == "cross_attention" else 0):
        state = attention(f"layers.{layer}", state, candidates)

    def term_gain(name, candidate, picked, start):
        def seen(x):
            return linear(f"terms.{name}.{'prototypes' if name == 'coverage' else 'view'}", x)

        if name == "mmr":
            return -max(F.cosine_similarity(seen(candidate), seen(x), dim=0) for x in picked)
        if name == "coverage":
            needs = len(seen(candidate)) * linear("terms.coverage.needs", start).softmax(0)
            left = torch.stack([1 - seen(x).sigmoid() for x in picked]).prod(0)
            return (needs * seen(candidate).sigmoid() * left).sum()

        def volume(rows):  # the definition, of the kernel of a set of candidates
            rows = torch.stack([seen(x) for x in rows])
            return torch.logdet(torch.eye(len(rows), dtype=rows.dtype) + rows @ rows.T)

        return volume([*picked, candidate]) - volume(picked)

    start = state if network else None
    steps = []
    for step, pick in enumerate(sequence):
        logits = torch.zeros(len(pool), dtype=query.dtype)
        if network:
            asking = linear("pointer.state_proj", state)
            if config.scoring == "additive":
                hidden = [(asking + linear("pointer.candidate_proj", c)).tanh() for c in candidates]
                logits = torch.cat([linear("pointer.out", x) for x in hidden])
            else:
                logits = torch.stack([asking @ c for c in candidates]) / math.sqrt(config.hidden_dim)
            for name in config.decoder_terms if step else ():
                gains = torch.stack(
                    [term_gain(name, c, [candidates[i] for i in sequence[:step]], start) for c in candidates]
                )
                logits = logits + weights[f"terms.{name}.weight"][step - 1] * gains
        if config.similarity_prior:
            logits = logits + mixed[:, min(step, 1)]
            for picked in sequence[:step]:
                logits = logits + scale[1] * likeness[picked] @ (16 * weights["prior.redundancy"])
        logits[list(sequence[:step])] = -math.inf
        steps.append(logits.log_softmax(0))
        if not network:
            continue
        change = linear("state_update.from_state", state) + linear("state_update.from_pick", candidates[pick])
        width = len(state)
        if config.state_update == "additive":
            state = state + change
        elif config.state_update == "gated":
            gate, proposal = change[:width].sigmoid(), change[width:].tanh()
            state = gate * state + (1 - gate) * proposal
        else:  # an independent implementation
            cell = torch.nn.GRUCell(width, width, dtype=state.dtype)
            cell.weight_ih.copy_(weights["state_update.from_pick.weight"])
            cell.weight_hh.copy_(weights["state_update.from_state.weight"])
            cell.bias_ih.zero_()
            cell.bias_hh.copy_(weights["state_update.from_state.bias"])
            state = cell(candidates[pick], state)
        state = norm("state_update.norm", state)
    return steps


@torch.no_grad()
@pytest.mark.parametrize("variant", POINTER_VARIANTS)
def test_forward_is_the_formula(variant):
    selector, batch = make_selector(variant), make_batch()
    output = selector(**batch, return_step_log_probs=True)
    assert output.log_probs.shape == (2, 3, 3) and output.step_log_probs.shape == (2, 3, 3, 5)
    for query, beam in itertools.product(range(2), range(3)):
        sequence = batch["sequences"][query, beam].tolist()
        steps = reference_log_probs(selector, batch["query_embeds"][query], batch["candidate_embeds"][query], sequence)
        close(output.step_log_probs[query, beam], torch.stack(steps))
        close(output.log_probs[query, beam], torch.stack([s[a] for s, a in zip(steps, sequence, strict=True)]))


# ---- against numbers that were worked out by hand ----


def by_hand(preset, **weights):
    """A selector of width 2 whose weights are zero, those of the norms one, but for those that are given."""
    selector = PointerSelector(
        PointerSelectorConfig.from_preset(preset, embed_dim=2, hidden_dim=2, num_attention_heads=1)
    )
    parameters = dict(selector.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
        for name, value in weights.items():
            parameters[name.replace("__", ".")].copy_(torch.tensor(value))
    return selector.eval()


EYE = [[1.0, 0.0], [0.0, 1.0]]
PICK_A_THEN_B = {
    "query_embeds": torch.tensor([[3.0, 1.0]]),
    "candidate_embeds": torch.tensor([[[2.0, 0.0], [0.0, 2.0], [5.0, 1.0]]]),
    "sequences": torch.tensor([[[0, 1]]]),
}


@torch.no_grad()
def test_v1_by_hand():
    """
    The norm of two numbers is (1, -1) if the first is larger, else (-1, 1): the query and the candidates A and C are
    (1, -1), and B is (-1, 1).
    """
    selector = by_hand(
        "v1",
        query_proj__weight=EYE,
        candidate_proj__weight=EYE,
        pointer__state_proj__weight=[[2**0.5, 0.0], [0.0, 0.0]],  # the logit is s₁ c₁, as √2 is divided by √H
        state_update__from_pick__weight=[[-2.0, 0.0], [0.0, -2.0]],
        state_update__norm__bias=[0.5, 0.0],
    )
    # step 1, s = (1, -1): the logits of A, B, C are 1, -1, 1
    first = 1 - math.log(math.e + 1 / math.e + math.e)
    # the state: (1, -1) - 2 (1, -1) = (-1, 1), which its norm leaves, and 0.5 more: (-0.5, 1)
    # step 2: the logits of B, C are 0.5, -0.5
    second = 0.5 - math.log(math.exp(0.5) + math.exp(-0.5))
    close(selector(**PICK_A_THEN_B).log_probs, torch.tensor([[[first, second]]]), atol=1e-4)


@torch.no_grad()
def test_v2_by_hand():
    selector = by_hand(
        "v2",
        query_proj__weight=EYE,
        candidate_proj__weight=EYE,
        layers__0__q_proj__weight=EYE,
        layers__0__k_proj__weight=[[math.log(2) / 2**0.5, 0.0], [0.0, 0.0]],
        layers__0__v_proj__weight=EYE,
        layers__0__o_proj__weight=[[-5.0, 0.0], [0.0, -5.0]],
        layers__0__up_proj__bias=[10.0, 0.0, 0.0, 0.0],
        layers__0__down_proj__weight=[[0.4, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
        layers__0__output_norm__weight=[1.0, 0.5],
        pointer__state_proj__weight=[[2**0.5, 0.0], [0.0, 2**0.5]],  # the logit is s · c
        state_update__from_state__bias=[-math.log(3), -math.log(3), 0.0, 0.0],
        state_update__from_pick__weight=[[0.0, 0.0], [0.0, 0.0], [-math.atanh(0.6), 0.0], [0.0, -math.atanh(0.6)]],
        state_update__norm__bias=[0.0, 1.0],
    )
    # as above, query, A and C are (1, -1), B is (-1, 1). Attention: q · k / √2 is ±ln(2) / 2, for A, B, C
    # +, -, +, so that their shares are as √2 : 1/√2 : √2, which is 0.4, 0.2, 0.4; the values add up to (0.6, -0.6),
    # which -5 makes (-3, 3). With the query: (-2, 2), whose norm is (-1, 1).
    # Feed-forward: 0.4 gelu(10) = 4 for the first: (3, 1), whose norm is (1, -1), by (1, 0.5): s = (1, -0.5)
    # step 1: the logits of A, B, C are 1.5, -1.5, 1.5
    first = 1.5 - math.log(2 * math.exp(1.5) + math.exp(-1.5))
    # the gate is σ(-ln 3) = 0.25, the proposal tanh(∓atanh 0.6) = (-0.6, 0.6): 0.25 (1, -0.5) + 0.75 (-0.6, 0.6) =
    # (-0.2, 0.325), whose norm is (-1, 1), and (0, 1) more: (-1, 2)
    # step 2: the logits of B, C are 3, -3
    second = 3 - math.log(math.exp(3) + math.exp(-3))
    close(selector(**PICK_A_THEN_B).log_probs, torch.tensor([[[first, second]]]), atol=1e-3)


# ---- a distribution over ordered sequences ----


@torch.no_grad()
@pytest.mark.parametrize("shots", [1, 2, 3])
def test_all_ordered_sequences_have_probability_one(variant, shots):
    selector, batch = make_selector(variant), make_batch(pool=4)
    batch["sequences"] = all_sequences(4, shots).expand(2, -1, -1)
    close(selector(**batch).log_probs.sum(-1).exp().sum(-1), torch.ones(2, dtype=torch.float64))
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])
    probabilities = selector(**batch, candidate_mask=mask).log_probs.sum(-1).exp()
    close(probabilities.sum(-1), torch.ones(2, dtype=torch.float64))
    assert (probabilities[1][(batch["sequences"][1] == 1).any(-1)] == 0).all()


@torch.no_grad()
def test_a_step_does_not_see_what_follows_nor_the_rest_of_the_group(variant):
    selector, batch = make_selector(variant), make_batch()
    whole = selector(**batch).log_probs
    for beam, step in itertools.product(range(3), range(3)):
        prefix = {**batch, "sequences": batch["sequences"][:, beam : beam + 1, : step + 1]}
        close(selector(**prefix).log_probs[:, 0, step], whole[:, beam, step])


@torch.no_grad()
def test_the_order_of_picks_matters(variant):
    if variant == "prior":
        pytest.skip("the prior alone sums over the picks, whatever their order")
    selector, batch = make_selector(variant), make_batch()
    batch["sequences"] = torch.tensor([[[0, 1, 2], [1, 0, 2]]]).expand(2, -1, -1)
    third = selector(**batch, return_step_log_probs=True).step_log_probs[:, :, 2]
    assert ((third[:, 0] - third[:, 1])[:, 2:].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_repeats_and_padded_picks_have_no_probability(variant):
    selector, batch = make_selector(variant), make_batch()
    batch["sequences"] = torch.tensor([[[0, 1, 0], [2, 2, 1], [4, 1, 0]]]).expand(2, -1, -1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[:, 4] = False
    output = selector(**batch, candidate_mask=mask, return_step_log_probs=True)
    never = output.log_probs == -math.inf
    assert never.tolist() == [[[False, False, True], [False, True, False], [True, False, False]]] * 2
    assert (output.step_log_probs[:, :, :, 4] == -math.inf).all()
    assert not output.step_log_probs.isnan().any()


@torch.no_grad()
def test_temperature_divides_the_logits(variant):
    selector, batch = make_selector(variant), make_batch()
    plain = selector(**batch, return_step_log_probs=True).step_log_probs
    hot = selector(**batch, return_step_log_probs=True, temperature=2.5).step_log_probs
    close(hot, (plain / 2.5).log_softmax(-1))


@torch.no_grad()
def test_step_log_probs_come_on_request_and_hold_the_log_probs():
    selector, batch = make_selector(), make_batch()
    assert selector(**batch).step_log_probs is None
    output = selector(**batch, return_step_log_probs=True)
    close(output.step_log_probs.gather(-1, batch["sequences"].unsqueeze(-1)).squeeze(-1), output.log_probs, atol=0)


# ---- invariances ----


@torch.no_grad()
def test_an_order_of_the_pool_orders_the_distribution(variant):
    selector, batch = make_selector(variant), make_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = {
        **batch,
        "candidate_embeds": batch["candidate_embeds"][:, order],
        "sequences": order.argsort()[batch["sequences"]],
    }
    before = selector(**batch, return_step_log_probs=True)
    after = selector(**moved, return_step_log_probs=True)
    close(after.log_probs, before.log_probs)
    close(after.step_log_probs, before.step_log_probs[..., order])


@torch.no_grad()
def test_an_order_of_the_group_or_the_batch_orders_the_output(variant):
    selector, batch = make_selector(variant), make_batch()
    order = torch.tensor([2, 0, 1])
    log_probs = selector(**batch).log_probs
    close(selector(**{**batch, "sequences": batch["sequences"][:, order]}).log_probs, log_probs[:, order])
    close(selector(**{name: x.flip(0) for name, x in batch.items()}).log_probs, log_probs.flip(0))


def test_shared_candidates_with_indices_equal_a_pool_per_query(variant):
    selector, batch = make_selector(variant), make_batch()
    unique = make_batch(queries=1, pool=9, seed=1)["candidate_embeds"][0]  # (9, D)
    indices = torch.tensor([[8, 0, 3, 5, 1], [2, 3, 8, 7, 0]])
    shared = {**batch, "candidate_embeds": unique, "candidate_indices": indices}
    own = {**batch, "candidate_embeds": unique[indices]}
    mask = torch.tensor([[True, True, True, True, True], [True, True, True, True, False]])
    sequences = torch.stack([batch["sequences"][0], torch.tensor([[3, 0, 2], [1, 2, 3], [0, 1, 2]])])
    lives = {"sequences": sequences, "candidate_mask": mask}
    weights = torch.rand(2, 3, 3, dtype=torch.float64)
    close(selector(**{**shared, **lives}).log_probs, selector(**{**own, **lives}).log_probs)
    expected = gradients(selector, {**own, **lives}, weights)
    for name, gradient in gradients(selector, {**shared, **lives}, weights).items():
        close(gradient, expected[name], msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_shared_candidates_without_indices_are_everyones_pool(variant):
    selector, batch = make_selector(variant), make_batch()
    pool = batch["candidate_embeds"][0]
    whole = selector(**{**batch, "candidate_embeds": pool}).log_probs
    close(whole, selector(**{**batch, "candidate_embeds": pool.expand(2, -1, -1)}).log_probs)


# ---- padding ----


@pytest.mark.parametrize("garbage", [0.0, -9.0, 1e30, math.inf, math.nan])
def test_padding_changes_neither_values_nor_gradients(variant, garbage):
    """Pools of 5 and 3 candidates, groups of 3 and 2 sequences, lengths of 3 to 1, against each query alone."""
    selector, batch = make_selector(variant), make_batch(pool=6, group=4, shots=4)
    candidate_mask = torch.tensor([[True] * 5 + [False], [True] * 3 + [False] * 3])
    lengths = torch.tensor([[3, 2, 1, 0], [2, 3, 0, 0]])
    batch["sequences"] = torch.tensor(
        [[[4, 0, 2, 5], [1, 3, 3, 1], [0, 0, 0, 0], [5, 5, 4, 5]], [[2, 0, 4, 4], [1, 0, 2, 5], [1, 2, 0, 5], [3] * 4]]
    )
    batch["candidate_embeds"] = batch["candidate_embeds"].masked_fill(~candidate_mask.unsqueeze(-1), garbage)
    sequence_mask = torch.arange(4) < lengths.unsqueeze(-1)
    padded = {**batch, "candidate_mask": candidate_mask, "sequence_mask": sequence_mask}
    weights = torch.randn(2, 4, 4, dtype=torch.float64)

    log_probs = selector(**padded).log_probs
    assert (log_probs[~sequence_mask] == 0).all()
    total = dict.fromkeys(dict(selector.named_parameters()), 0.0)
    for query, (pool, length) in enumerate(zip((5, 3), lengths, strict=True)):
        for beam, shots in enumerate(length.tolist()):
            if shots == 0:
                continue
            alone = {
                "query_embeds": batch["query_embeds"][query : query + 1],
                "candidate_embeds": batch["candidate_embeds"][query : query + 1, :pool],
                "sequences": batch["sequences"][query : query + 1, beam : beam + 1, :shots],
            }
            close(log_probs[query, beam, :shots], selector(**alone).log_probs[0, 0])
            share = gradients(selector, alone, weights[query, beam, :shots])
            total = {name: total[name] + share[name] for name in total}
    for name, gradient in gradients(selector, padded, weights).items():
        close(gradient, total[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_query_without_candidates_is_finite_and_alone(variant):
    selector, batch = make_selector(variant), make_batch()
    mask = torch.tensor([[True] * 5, [False] * 5])
    lives = {"candidate_mask": mask, "sequence_mask": mask[:, :3].unsqueeze(1).expand(2, 3, 3)}
    output = selector(**batch, **lives, return_step_log_probs=True)
    assert output.step_log_probs[1].isfinite().all()
    assert (output.log_probs[1] == 0).all()
    first = {name: x[:1] for name, x in batch.items()}
    close(output.log_probs[:1], selector(**first).log_probs)
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    expected = gradients(selector, first, weights[:1])
    for name, gradient in gradients(selector, {**batch, **lives}, weights).items():
        close(gradient, expected[name])


@torch.no_grad()
@pytest.mark.parametrize(("queries", "group", "shots"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_empty_batches_groups_and_sequences_have_empty_outputs(queries, group, shots):
    output = make_selector()(**make_batch(queries, 5, group, shots), return_step_log_probs=True)
    assert output.log_probs.shape == (queries, group, shots)
    assert output.step_log_probs.shape == (queries, group, shots, 5)


# ---- the work that is shared ----


@torch.no_grad()
@pytest.mark.parametrize("group", [1, 7])
def test_the_encoder_runs_once_per_query_whatever_the_group(group):
    selector, batch = make_selector("v3-prior-sets"), make_batch(queries=3, pool=4, group=group)
    seen = {}
    for name, module in selector.named_modules():
        if (name.endswith("_proj") and not name.startswith("pointer")) or "metric" in name:
            module.register_forward_hook(
                lambda module, args, output, name=name: seen.setdefault(name, []).append(tuple(args[0].shape))
            )
    selector(**batch)
    assert seen["query_proj"] == [(3, QUERY_WIDTH)]
    assert seen["candidate_proj"] == [(3, 4, CANDIDATE_WIDTH)]
    assert seen["layers.0.q_proj"] == [(3, 1, 8)]
    assert seen["set_layers.0.k_proj"] == seen["set_layers.0.q_proj"] == [(3, 4, 8)]
    assert "layers.0.k_proj" not in seen  # one token attends: see the next test
    assert seen["prior.candidate_metric.image"] == [(3, 4, 3)]
    assert all(len(calls) == 1 for calls in seen.values())

    seen.clear()
    unique = torch.randn(6, CANDIDATE_WIDTH, dtype=torch.float64)
    indices = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [5, 1, 0, 2]])
    selector(**{**batch, "candidate_embeds": unique, "candidate_indices": indices})
    assert seen["candidate_proj"] == [(6, CANDIDATE_WIDTH)]  # each candidate of the batch once
    assert seen["prior.candidate_metric.image"] == [(6, 3)]


class Adapted(nn.Linear):
    """A linear layer that is more than its weights, as those with adapters are."""


def test_one_token_attends_as_if_the_whole_context_were_projected():
    torch.manual_seed(0)
    attention = Attention(width=12, num_heads=3).double()
    context, mask = torch.randn(4, 5, 12, dtype=torch.float64), torch.rand(4, 5) < 0.7
    mask[:, 2] = True
    token = torch.randn(4, 1, 12, dtype=torch.float64)
    gradients = []
    for kind in (nn.Linear, Adapted):
        attention.v_proj.__class__ = kind
        context.grad = None
        inputs = [token.clone().requires_grad_(), context.clone().requires_grad_()]
        attended = attention.attend(*inputs, mask)
        wanted = torch.autograd.grad(attended.square().sum(), [*inputs, *attention.parameters()])
        gradients.append([attended, *wanted])
    for once, projected in zip(*gradients, strict=True):
        torch.testing.assert_close(once, projected, atol=1e-10, rtol=1e-10)


# ---- gradients ----


def test_gradients_are_those_of_finite_differences(variant):
    selector, batch = make_selector(variant), make_batch()
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    # what the set layers are told of the prior is detached on purpose, so finite differences would differ there
    detached = ("prior.",) if variant == "v3-prior-sets" else ()
    named = {name: p for name, p in selector.named_parameters() if not name.startswith(detached or "-")}
    analytic = gradients(selector, batch, weights)
    for name, parameter in named.items():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(step * direction)
                values.append((selector(**batch).log_probs * weights).sum())
                parameter.sub_(step * direction)
        numeric = (values[0] - values[1]) / 2e-5
        close(
            (analytic[name] * direction).sum(), numeric, atol=1e-6, rtol=1e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


def test_gradients_reach_the_embeddings_as_finite_differences_say(variant):
    if variant == "v3-prior-sets":
        pytest.skip("the relations of the set layers are detached")
    selector, batch = make_selector(variant), make_batch(queries=1, pool=3, group=2, shots=2)

    def log_probs(query, pool):
        return selector(query, pool, sequences=batch["sequences"]).log_probs

    inputs = [batch[name].requires_grad_() for name in ("query_embeds", "candidate_embeds")]
    assert torch.autograd.gradcheck(log_probs, inputs)


def test_every_parameter_learns(variant):
    selector = make_selector(variant, trained=False).train()  # with dropout
    batch = make_batch(queries=4, pool=5)
    optimizer = torch.optim.SGD(selector.parameters(), lr=0.01)
    start = {name: parameter.detach().clone() for name, parameter in selector.named_parameters()}
    for _ in range(4):  # what starts at zero holds back the gradient of what is behind it for a step
        optimizer.zero_grad()
        (-selector(**batch).log_probs * torch.rand(4, 3, 1)).sum().backward()
        assert all(parameter.grad is not None for parameter in selector.parameters())
        optimizer.step()
    still = [name for name, parameter in selector.named_parameters() if torch.equal(parameter, start[name])]
    # a shift of all keys shifts all attention scores alike: in exact arithmetic its gradient is zero
    assert [name for name in still if not name.endswith("k_proj.bias")] == []


# ---- wrong inputs ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": None}, "forward needs `sequences`"),
        ({"sequences": torch.zeros(2, 3, dtype=torch.long)}, r"sequences has shape \(2, 3\), expected \(2, G, S\)"),
        ({"sequences": torch.zeros(1, 3, 1, dtype=torch.long)}, r"sequences has shape \(1, 3, 1\)"),
        ({"sequence_mask": torch.ones(2, 3, 1)}, r"sequence_mask has shape \(2, 3, 1\), .* \(2, 3, 3\)"),
        ({"query_embeds": torch.zeros(2, 6)}, r"query_embeds has shape \(2, 6\), expected \(B, 7\)"),
        ({"query_embeds": torch.zeros(7)}, r"query_embeds has shape \(7,\)"),
        ({"candidate_embeds": torch.zeros(2, 5, 7)}, r"candidate_embeds has shape \(2, 5, 7\), .* \(B, K, 11\)"),
        ({"candidate_embeds": torch.zeros(3, 5, 11)}, "3 pools for 2 queries"),
        ({"candidate_mask": torch.ones(2, 4)}, r"candidate_mask has shape \(2, 4\), expected \(2, 5\)"),
        ({"candidate_indices": torch.zeros(2, 5, dtype=torch.long)}, "needs shared candidates"),
        (
            {"candidate_embeds": torch.zeros(9, 11), "candidate_indices": torch.zeros(1, 5, dtype=torch.long)},
            r"candidate_indices has shape \(1, 5\), expected \(2, K\)",
        ),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_selector()(**{**make_batch(), **change})


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="'labels'"):
        make_selector()(**make_batch(), labels=torch.zeros(2))


@torch.no_grad()
def test_dropout_is_for_training_alone(variant):
    selector, batch = make_selector(variant, dropout=0.5, prior_dropout=0.5), make_batch()
    assert torch.equal(selector(**batch).log_probs, selector(**batch).log_probs)
    selector.train()
    assert not torch.equal(selector(**batch).log_probs, selector(**batch).log_probs)


def test_the_relations_of_the_set_layers_teach_the_prior_nothing():
    # the prior learns as the logit that it is, not as an input of the network that corrects it
    selector, batch = make_selector("v3-prior-sets"), make_batch()
    pools = selector.check_inputs(batch["query_embeds"], batch["candidate_embeds"], None, None)
    assert pools.prior.first.requires_grad and not selector._relations(pools).requires_grad
