"""The action to stop: a policy over sequences of any length."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from small_selectors import SMALL, make_batch

from lever_grpo.models import PRESETS, config_from_preset


POOL, LONGEST = 4, 3


@pytest.fixture(params=[{"preset": "v3"}, {"preset": "v1", "similarity_prior": True, "decoder_terms": ["mmr"]}])
def selector(request):
    torch.manual_seed(0)
    options = {**SMALL, "stop": True, "max_shots": LONGEST, **request.param}
    selector = PRESETS[options["preset"]](config_from_preset(**options)).double().eval()
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return selector


def pools(queries=2):
    batch = make_batch(queries, POOL)
    return {name: batch[name] for name in ("query_embeds", "candidate_embeds")}


def every_sequence(longest=LONGEST):
    """All sequences of one to `longest` picks, padded: (1, G, S) each."""
    found = [s for n in range(1, longest + 1) for s in itertools.permutations(range(POOL), n)]
    mask = torch.tensor([[i < len(s) for i in range(longest)] for s in found])
    return torch.tensor([[*s, *[0] * (longest - len(s))] for s in found])[None], mask[None], found


@torch.no_grad()
def test_the_sequences_of_all_lengths_share_a_probability_of_one(selector):
    sequences, mask, found = every_sequence()
    output = selector(**pools(1), sequences=sequences, sequence_mask=mask)
    assert output.log_probs.shape == output.step_mask.shape == (1, len(found), LONGEST + 1)
    assert output.log_probs.sum(-1).exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    # a sequence that is as long as it may be ends unasked
    steps = [len(s) + (len(s) < LONGEST) for s in found]
    assert output.step_mask[0].sum(-1).tolist() == steps


@torch.no_grad()
def test_a_step_is_a_pick_or_the_stop(selector):
    sequences, mask = torch.tensor([[[2, 0, 0]]]), torch.tensor([[[True, False, False]]])
    output = selector(**pools(1), sequences=sequences, sequence_mask=mask, return_step_log_probs=True)
    encoding = selector.encode(**pools(1))
    pick = torch.tensor([[2]])
    state = selector.advance(encoding, encoding.state, pick)
    stop = selector.stop_head(state).squeeze()
    assert output.step_log_probs.shape == (1, 1, 4, POOL + 1)
    assert torch.allclose(output.step_log_probs[0, 0, :3].exp().sum(-1), torch.ones(3, dtype=torch.float64))
    assert output.step_log_probs[0, 0, 0, -1] == -math.inf  # there is one demonstration at least
    assert torch.allclose(output.step_log_probs[0, 0, 1, -1], F.logsigmoid(stop))
    logits = selector.step_logits(encoding, state, pick.unsqueeze(-1))[0, 0]
    logits[2] = -math.inf
    assert torch.allclose(output.step_log_probs[0, 0, 1, :-1], logits.log_softmax(0) + F.logsigmoid(-stop))
    first = selector.step_logits(encoding, encoding.state, pick.unsqueeze(-1)[..., :0])[0, 0].log_softmax(0)
    assert torch.allclose(output.log_probs[0, 0], torch.stack([first[2], F.logsigmoid(stop), *torch.zeros(2)]))


@torch.no_grad()
def test_beams_as_wide_as_all_sequences_find_them_in_order(selector):
    sequences, mask, found = every_sequence()
    output = selector(**pools(), sequences=sequences.expand(2, -1, -1), sequence_mask=mask.expand(2, -1, -1))
    count = len(found)
    picked = selector.select(**pools(), num_shots=LONGEST, num_beams=count, num_return_sequences=count)
    for query in range(2):
        expected = dict(zip(found, output.log_probs[query].sum(-1).tolist(), strict=True))
        got = [tuple(i for i in s if i >= 0) for s in picked.sequences[query].tolist()]
        assert set(got) == set(found)
        assert picked.scores[query].tolist() == pytest.approx([expected[s] for s in got], abs=1e-9)
        assert picked.scores[query].tolist() == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-9)


@torch.no_grad()
def test_samples_come_as_often_as_the_policy_says(selector):
    sequences, mask, found = every_sequence()
    expected = selector(**pools(1), sequences=sequences, sequence_mask=mask).log_probs[0].sum(-1).exp()
    drawn = selector.select(
        **pools(1),
        num_shots=LONGEST,
        do_sample=True,
        num_return_sequences=20_000,
        generator=torch.Generator().manual_seed(0),
    )
    got = [tuple(i for i in s if i >= 0) for s in drawn.sequences[0].tolist()]
    counts = torch.tensor([got.count(s) for s in found]) / len(got)
    assert torch.allclose(counts, expected.float(), atol=0.015)
    by_sequence = dict(zip(found, expected.log().tolist(), strict=True))
    assert drawn.scores[0].tolist() == pytest.approx([by_sequence[s] for s in got], abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bias, length", [(-9.0, LONGEST), (9.0, 1)])
def test_greedy_decoding_asks_first_whether_to_stop(selector, bias, length):
    selector.stop_head.bias.fill_(bias)
    selector.stop_head.weight.zero_()
    picked = selector.select(**pools(), num_shots=LONGEST)
    assert (picked.sequences[:, 0] >= 0).sum(-1).tolist() == [length] * 2
    mask = picked.sequences >= 0
    scores = selector(**pools(), sequences=picked.sequences.clamp(min=0), sequence_mask=mask).log_probs.sum(-1)
    assert torch.allclose(picked.scores.double(), scores)
    # a stop that is less probable than going on does not win against many candidates
    selector.stop_head.bias.fill_(-0.1)
    assert (selector.select(**pools(), num_shots=LONGEST).sequences >= 0).all()


@torch.no_grad()
def test_min_shots_are_picked_unasked(selector):
    selector.stop_head.bias.fill_(50.0)
    plain = selector.select(**pools(), num_shots=3, min_shots=3)
    assert (plain.sequences >= 0).all()
    assert ((selector.select(**pools(), num_shots=3, min_shots=2).sequences >= 0).sum(-1) == 2).all()


@torch.no_grad()
def test_a_pool_that_is_used_up_ends_the_sequence(selector):
    inputs = {**pools(1), "candidate_mask": torch.tensor([[True, True, False, False]])}
    sequences, mask = torch.tensor([[[1, 0, 0]]]), torch.tensor([[[True, True, False]]])
    output = selector(**inputs, sequences=sequences, sequence_mask=mask)
    assert output.log_probs[0, 0, 2] == 0.0 and output.step_mask[0, 0].tolist() == [True, True, True, False]


def test_training_reaches_the_stop_and_padding_does_not_matter(selector):
    sequences = torch.tensor([[[1, 2], [3, 0]], [[0, 0], [2, 1]]])
    mask = torch.tensor([[[True, True], [True, False]], [[True, False], [False, False]]])
    output = selector(**pools(), sequences=sequences, sequence_mask=mask)
    output.log_probs.sum().backward()
    assert selector.stop_head.weight.grad.abs().sum() > 0
    longer = F.pad(sequences, (0, 2), value=1), F.pad(mask, (0, 2))
    padded = selector(**pools(), sequences=longer[0], sequence_mask=longer[1])
    assert torch.allclose(padded.log_probs.sum(-1), output.log_probs.sum(-1))
    assert (output.log_probs[1, 1] == 0).all() and not output.step_mask[1, 1].any()
