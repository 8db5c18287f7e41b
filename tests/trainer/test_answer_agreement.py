"""Post-training on the agreement of answers."""

import copy

import pytest
import torch

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.trainer import fit_answer_agreement


def make_rows(rows=96, classes=4, width=12, seed=0):
    """Rows whose class is weak in what the query sees, and drowned by other directions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    answers = torch.eye(classes)[labels]
    embeds = 2.0 * torch.randn(rows, width, generator=generator)
    embeds[:, :classes] = 2.0 * answers + 0.5 * torch.randn(rows, classes, generator=generator)
    return torch.nn.functional.normalize(embeds, dim=-1), answers, labels


def make_selector(width=12, **options):
    torch.manual_seed(0)
    config = PointerSelectorConfig(embed_dim=width, encoder="none", similarity_prior=True, prior_rank=8, **options)
    return PointerSelector(config)


def share_of_agreeing_picks(selector, embeds, labels):
    selector.eval()
    others = ~torch.eye(len(embeds), dtype=torch.bool)
    picks = selector.select(embeds, embeds, candidate_mask=others, num_shots=2).sequences[:, 0]  # (N, 2)
    return (labels[picks] == labels.unsqueeze(1)).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_unseen_rows_pick_rows_with_their_answer(seed):
    seen, answers, _ = make_rows(rows=400, seed=seed)
    unseen, _, labels = make_rows(seed=seed + 10)
    selector = make_selector()
    before = share_of_agreeing_picks(selector, unseen, labels)
    fit_answer_agreement(selector, seen, seen, answers, steps=200, batch_size=128, learning_rate=3e-3, seed=seed)
    assert share_of_agreeing_picks(selector, unseen, labels) > before + 0.1


def test_shuffled_answers_teach_nothing():
    """The gain comes from the answers: with those of other rows there is none."""
    seen, answers, _ = make_rows(rows=400)
    unseen, _, labels = make_rows(seed=10)
    selector = make_selector()
    before = share_of_agreeing_picks(selector, unseen, labels)
    shuffled = answers[torch.randperm(400, generator=torch.Generator().manual_seed(0))]
    fit_answer_agreement(selector, seen, seen, shuffled, steps=200, batch_size=128, learning_rate=3e-3)
    assert share_of_agreeing_picks(selector, unseen, labels) < before + 0.1


def test_the_first_loss_is_the_formula_and_leaves_entities_out():
    embeds, answers, _ = make_rows(rows=6)
    entities = torch.tensor([0, 0, 1, 2, 3, 4])
    selector = make_selector(prior_dropout=0.0)
    scale = selector.config.prior_scale
    expected = 0.0
    for i in range(6):
        others = [j for j in range(6) if entities[j] != entities[i]]
        logits = torch.stack([scale * embeds[i] @ embeds[j] for j in others])
        agreement = torch.stack([((answers[i] @ answers[j] - 1) / 0.1).exp() for j in others])
        expected -= 2 * (logits.softmax(0) @ agreement + 1e-3).log().item() / 6  # first and later picks alike
    losses = fit_answer_agreement(copy.deepcopy(selector), embeds, embeds, answers, entities, steps=1)
    assert losses == [pytest.approx(expected, rel=1e-4)]


def test_same_seed_same_weights_and_the_global_generator_is_left_alone():
    embeds, answers, _ = make_rows()
    results = []
    for noise in (1, 2):
        selector = make_selector()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        fit_answer_agreement(selector, embeds, embeds, answers, steps=5, batch_size=32, seed=3)
        assert torch.equal(state, torch.get_rng_state())
        results.append(selector.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_what_cannot_be_fitted_is_refused():
    embeds, answers, _ = make_rows(rows=8)
    without = PointerSelector(PointerSelectorConfig(embed_dim=12, hidden_dim=8))
    with pytest.raises(ValueError, match="similarity prior"):
        fit_answer_agreement(without, embeds, embeds, answers)
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_answer_agreement(make_selector(), embeds[:1], embeds[:1], answers[:1])


def test_the_gradient_is_a_group_relative_policy_gradient():
    """−log(r̄ + c) has the gradient of −Σ π·A with the advantages A = (r − r̄) / (r̄ + c) held fixed."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    loss = -((logits.softmax(-1) * rewards).sum(-1) + 1e-3).log().mean()
    (gradient,) = torch.autograd.grad(loss, logits)

    policy = logits.softmax(-1)
    mean = (policy * rewards).sum(-1, keepdim=True)
    advantages = ((rewards - mean) / (mean + 1e-3)).detach()
    (expected,) = torch.autograd.grad(-(policy * advantages).sum(-1).mean(), logits)
    torch.testing.assert_close(gradient, expected)
