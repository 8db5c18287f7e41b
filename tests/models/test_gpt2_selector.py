"""What is the GPT-2 selector's own; what all selectors share is tested with the variants of `small_selectors`."""

import itertools
import math

import pytest
import torch
from small_selectors import CANDIDATE_WIDTH, QUERY_WIDTH, make_batch, make_selector
from transformers import AutoModel, GPT2Config, GPT2Model

from lever_grpo.models import GPT2Selector, GPT2SelectorConfig


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **{"atol": 1e-10, "rtol": 1e-8, **tolerance})


def reference_log_probs(selector: GPT2Selector, query, pool, sequence, prior=None) -> list[torch.Tensor]:
    """The distribution of each step, of one sequence that a GPT-2 of its own reads at once, from weights by name."""
    weights = selector.state_dict()
    width = selector.config.hidden_dim
    gpt2 = GPT2Model(GPT2Config(vocab_size=2, n_positions=10, n_embd=width, n_layer=2, n_head=2)).double().eval()
    gpt2.load_state_dict({name[5:]: value for name, value in weights.items() if name.startswith("gpt2.")})
    asked = weights["query_proj.weight"] @ query + weights["query_proj.bias"]
    inputs = [weights["gpt2.wte.weight"][0], weights["gpt2.wte.weight"][1] + asked]
    inputs += [weights["candidate_in.weight"] @ pool[pick] for pick in sequence]
    hidden = gpt2(inputs_embeds=torch.stack(inputs).unsqueeze(0)).last_hidden_state[0, 1:]
    steps = []
    for step in range(len(sequence)):
        logits = torch.stack([hidden[step] @ weights["candidate_out.weight"] @ c for c in pool])
        if selector.config.scale_logits:
            logits = logits / math.sqrt(width)
        if prior is not None:
            logits = logits + prior[step]
        logits[sequence[:step]] = -math.inf
        steps.append(logits.log_softmax(0))
    return steps


@torch.no_grad()
@pytest.mark.parametrize("scale_logits", [True, False])
def test_forward_is_gpt2_on_each_sequence(scale_logits):
    selector, batch = make_selector("v0", scale_logits=scale_logits), make_batch()
    output = selector(**batch, return_step_log_probs=True)
    for query, beam in itertools.product(range(2), range(3)):
        sequence = batch["sequences"][query, beam].tolist()
        steps = reference_log_probs(selector, batch["query_embeds"][query], batch["candidate_embeds"][query], sequence)
        close(output.step_log_probs[query, beam], torch.stack(steps))
        close(output.log_probs[query, beam], torch.stack([s[a] for s, a in zip(steps, sequence, strict=True)]))


@torch.no_grad()
def test_the_prior_is_added_to_each_step():
    selector, batch = make_selector("v0-prior"), make_batch()
    pools = selector.check_inputs(batch["query_embeds"], batch["candidate_embeds"], None, None)
    output = selector(**batch, return_step_log_probs=True)
    for query, beam in itertools.product(range(2), range(3)):
        sequence = batch["sequences"][query, beam]
        added = [selector.prior(pools.prior, batch["sequences"][:, :, :step]) for step in range(3)]
        prior = [x.expand(-1, 3, -1)[query, beam] for x in added]
        arguments = batch["query_embeds"][query], batch["candidate_embeds"][query], sequence.tolist()
        close(output.step_log_probs[query, beam], torch.stack(reference_log_probs(selector, *arguments, prior)))


@torch.no_grad()
def test_untrained_with_a_prior_it_is_the_similarity_baseline():
    batch = make_batch()
    baseline, selector = (make_selector(variant, trained=False) for variant in ("prior", "v0-prior"))
    expected, output = (model(**batch, return_step_log_probs=True) for model in (baseline, selector))
    close(output.step_log_probs, expected.step_log_probs)


@torch.no_grad()
@pytest.mark.parametrize("hidden_dim", [64, 512])
def test_untrained_without_a_prior_it_is_near_uniform_at_any_width(hidden_dim):
    torch.manual_seed(0)
    selector = GPT2Selector(GPT2SelectorConfig(embed_dim=256, hidden_dim=hidden_dim)).eval()
    query, pool = (torch.nn.functional.normalize(torch.randn(*shape), dim=-1) for shape in ((4, 256), (4, 10, 256)))
    steps = selector(query, pool, sequences=torch.tensor([[[3, 1]]] * 4), return_step_log_probs=True).step_log_probs
    assert (steps[:, :, 0] + math.log(10)).abs().max() < 0.5
    assert steps[:, :, 0].std() > 0  # but not blind


def test_initial_weights_are_those_of_gpt2_and_of_the_width_of_projections():
    torch.manual_seed(0)
    selector = GPT2Selector(GPT2SelectorConfig(embed_dim=128, hidden_dim=64, num_layers=2))
    assert selector.gpt2.wpe.weight.std().item() == pytest.approx(0.02, rel=0.2)
    for block in selector.gpt2.h:
        for linear in (block.attn.c_attn, block.mlp.c_fc):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and (linear.bias == 0).all()
        for linear in (block.attn.c_proj, block.mlp.c_proj):  # less, by the number of residual layers
            assert linear.weight.std().item() == pytest.approx(0.02 / 4**0.5, rel=0.1) and (linear.bias == 0).all()
        assert (block.ln_1.weight == 1).all() and (block.ln_1.bias == 0).all()
    for linear in (selector.query_proj, selector.candidate_in, selector.candidate_out):
        assert linear.weight.std().item() == pytest.approx(128**-0.5, rel=0.1)


def test_a_checkpoint_without_a_decision_to_stop_starts_one_that_has_it(tmp_path):
    selector = make_selector("v0").float()
    selector.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, stop=True, similarity_prior=True)
    for name, value in selector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    assert (loaded.stop_head.weight != 0).any() and (loaded.stop_head.bias == 0).all()


# ---- length ----


@torch.no_grad()
def test_with_stop_all_sequences_of_any_length_have_probability_one():
    selector = make_selector("v0", stop=True, max_shots=3)
    sequences, lengths = [], []
    for length in (1, 2, 3):
        for picks in itertools.permutations(range(3), length):
            sequences.append([*picks, *[0] * (3 - length)])
            lengths.append(length)
    batch = make_batch(pool=3)
    batch["sequences"] = torch.tensor(sequences).expand(2, -1, -1)
    batch["sequence_mask"] = (torch.arange(3) < torch.tensor(lengths)[:, None]).expand(2, -1, -1)
    total = selector(**batch).log_probs.sum(-1)
    close(total.exp().sum(-1), torch.ones(2, dtype=torch.float64))

    picks = selector.select(
        batch["query_embeds"], batch["candidate_embeds"], num_shots=3, num_beams=15, num_return_sequences=15
    )
    order = total.argsort(dim=-1, descending=True)
    close(picks.scores, total.gather(1, order).to(picks.scores), atol=1e-5)
    ended = torch.where(batch["sequence_mask"], batch["sequences"], -1)
    assert torch.equal(picks.sequences, ended.gather(1, order.unsqueeze(-1).expand(-1, -1, 3)))


@torch.no_grad()
@pytest.mark.parametrize("stop", [False, True])
def test_a_sequence_longer_than_max_shots_is_refused(stop):
    selector, batch = make_selector("v0", stop=stop, max_shots=3), make_batch(shots=3)
    assert selector(**batch).log_probs.isfinite().all()
    embeds = batch["query_embeds"], batch["candidate_embeds"]
    assert selector.select(*embeds, num_shots=3).sequences.shape == (2, 1, 3)
    with pytest.raises(ValueError, match="4 demonstrations are more than max_shots=3"):
        selector(**make_batch(shots=4))
    with pytest.raises(ValueError, match="4 demonstrations are more than max_shots=3"):
        selector.select(*embeds, num_shots=4)


@torch.no_grad()
@pytest.mark.parametrize(("queries", "group", "shots"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_empty_batches_groups_and_sequences_have_empty_outputs(queries, group, shots):
    output = make_selector("v0")(**make_batch(queries, 5, group, shots), return_step_log_probs=True)
    assert output.log_probs.shape == (queries, group, shots)
    assert output.step_log_probs.shape == (queries, group, shots, 5)


# ---- work ----


@torch.no_grad()
def test_projections_run_once_per_query_and_picks_are_read_in_one_pass():
    selector, batch = make_selector("v0"), make_batch(queries=3, pool=4, group=7)
    seen = {}
    for name in ("query_proj", "candidate_in", "candidate_out", "gpt2.drop"):
        selector.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.setdefault(name, []).append(tuple(args[0].shape))
        )
    unique = torch.randn(6, CANDIDATE_WIDTH, dtype=torch.float64)
    indices = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5], [5, 1, 0, 2]])
    selector(**{**batch, "candidate_embeds": unique, "candidate_indices": indices})
    assert seen == {
        "query_proj": [(3, QUERY_WIDTH)],
        "candidate_in": [(6, CANDIDATE_WIDTH)],
        "candidate_out": [(6, CANDIDATE_WIDTH)],
        "gpt2.drop": [(3, 2, 8), (21, 4, 8)],  # the query, then the query with the two picks that a third sees
    }


# ---- it learns ----


def test_it_learns_a_pick_that_depends_on_what_was_picked():
    """The second demonstration is the one that looks like the first: no query tells which."""
    torch.manual_seed(0)
    selector = GPT2Selector(GPT2SelectorConfig(embed_dim=8, hidden_dim=32, dropout=0.0))
    optimizer = torch.optim.Adam(selector.parameters(), lr=3e-3)

    def draw(queries: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pool = torch.randn(queries, 5, 8)
        first = torch.randint(0, 5, (queries, 1))
        twin = (first + torch.randint(1, 5, (queries, 1))) % 5
        rows = torch.arange(queries)
        pool[rows, twin[:, 0]] = pool[rows, first[:, 0]] + 0.1 * torch.randn(queries, 8)
        return torch.randn(queries, 8), pool, torch.cat([first, twin], dim=1).unsqueeze(1)

    for _ in range(150):
        query, pool, sequences = draw(64)
        optimizer.zero_grad()
        (-selector(query, pool, sequences=sequences).log_probs[..., 1].mean()).backward()
        optimizer.step()
    query, pool, sequences = draw(200)
    with torch.no_grad():
        steps = selector.eval()(query, pool, sequences=sequences, return_step_log_probs=True).step_log_probs
    right = (steps[:, 0, 1].argmax(-1) == sequences[:, 0, 1]).float().mean()
    assert right > 0.8  # by chance 0.25


# ---- configuration ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 10}, "hidden_dim=10 is not a multiple of num_attention_heads=4"),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ({"num_layers": 0}, "num_layers=0: must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0: must be in \[0, 1\)"),
    ],
)
def test_a_bad_value_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GPT2SelectorConfig(**options)


def test_dropout_is_gpt2s():
    selector = make_selector("v0", dropout=0.25)
    rates = {name: module.p for name, module in selector.named_modules() if isinstance(module, torch.nn.Dropout)}
    assert len(rates) == 1 + 2 * 3 and set(rates.values()) == {0.25}
