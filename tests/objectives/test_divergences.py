import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lever_grpo.objectives import bound_log_ratio, exact_kl, kl_estimate, step_entropy


NAN, INF = float("nan"), float("inf")


def pointer_steps(logits: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """Teacher-forced steps (B, G, S, K) of a pointer whose logits depend on the previous pick; picked ones at -inf."""
    steps = []
    for t in range(sequences.shape[-1]):
        previous = sequences[..., t - 1] if t else torch.full_like(sequences[..., 0], logits.shape[0] - 1)
        step = logits[previous]  # (B, G, K)
        for s in range(t):
            step = step.scatter(-1, sequences[..., s : s + 1], -INF)
        steps.append(step.log_softmax(-1))
    return torch.stack(steps, 2)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_kl_equals_brute_force_enumeration_of_all_sequences(direction):
    # KL(joint p || joint q) = sum over sequences of p(y) log p(y)/q(y) = E_p[sum over steps of the per-step KL].
    size, shots = 4, 2
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(size + 1, size, generator=generator, dtype=torch.float64) for _ in range(2)]
    sequences = torch.tensor(list(itertools.permutations(range(size), shots))).unsqueeze(0)  # (1, 12, 2)
    policy, reference = (pointer_steps(x, sequences) for x in logits)
    log_p, log_q = (x.gather(-1, sequences.unsqueeze(-1)).sum((-1, -2)) for x in (policy, reference))  # (1, 12)
    assert log_p.exp().sum().item() == pytest.approx(1.0)
    steps = exact_kl(policy, reference, direction).sum(-1)  # (1, 12)
    if direction == "forward":
        log_p, log_q = log_q, log_p
    brute_force = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close((log_p.exp() * steps).sum(), brute_force)
    assert brute_force > 0.1


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_exact_kl_by_hand_and_masked_candidates_add_nothing(direction):
    p, q = [0.5, 0.25, 0.25], [0.2, 0.2, 0.6]
    a, b = (p, q) if direction == "reverse" else (q, p)
    expected = sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))
    policy = torch.tensor([*p, 0.0]).log().view(1, 1, 1, 4)
    reference = torch.tensor([*q, 0.0]).log().view(1, 1, 1, 4)
    assert exact_kl(policy, reference, direction).item() == pytest.approx(expected, rel=1e-5)
    assert exact_kl(policy, policy, direction).item() == 0.0


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_gradients_are_right_and_finite_with_masked_candidates_and_nan_padding(direction):
    logits = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    reference = torch.randn(2, 3, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    unavailable = torch.zeros(2, 3, 2, 4, dtype=torch.bool)
    unavailable[:, :, 1, 2] = True
    reference = reference.masked_fill(unavailable, -INF).log_softmax(-1)
    real = torch.ones(2, 3, 2, dtype=torch.bool)
    real[1, 2, 1] = False

    def loss(x, broken=0.0):
        steps = x.masked_fill(unavailable, -INF).log_softmax(-1)
        steps = torch.where(real.unsqueeze(-1), steps, steps + broken)
        kl = exact_kl(steps, reference, direction, sequence_mask=real)
        return kl.sum() + step_entropy(steps, normalize=True, sequence_mask=real).sum()

    assert torch.autograd.gradcheck(loss, logits)
    plain = torch.autograd.grad(loss(logits), logits)[0]
    with_nan = torch.autograd.grad(loss(logits, broken=NAN), logits)[0]
    torch.testing.assert_close(with_nan[0], plain[0])
    # The gradient that reaches the divergence's own argument is finite at -inf and at NaN.
    steps = logits.detach().masked_fill(unavailable, -INF).log_softmax(-1)
    steps[1, 2, 1] = NAN
    steps.requires_grad_()
    kl = exact_kl(steps, reference, direction, sequence_mask=real)
    (kl.sum() + step_entropy(steps, sequence_mask=real).sum()).backward()
    assert kl.isfinite().all() and steps.grad.isfinite().all()
    assert not steps.grad[unavailable].any() and not steps.grad[1, 2, 1].any() and kl[1, 2, 1] == 0


def test_what_only_one_side_rules_out_is_not_hidden():
    policy = torch.tensor([0.5, 0.5]).log().view(1, 1, 1, 2)
    reference = torch.tensor([1.0, 0.0]).log().view(1, 1, 1, 2)
    assert exact_kl(policy, reference).item() == INF
    assert exact_kl(policy, reference, "forward").item() == pytest.approx(math.log(2))
    assert exact_kl(torch.full((1, 1, 1, 2), NAN), reference).isnan().all()


def test_estimators_by_hand():
    new, ref = torch.tensor([[[0.5, 0.1]]]).log(), torch.tensor([[[0.25, 0.2]]]).log()
    log_two = math.log(2)
    cases = {
        ("k1", "reverse"): [log_two, -log_two],
        ("k1", "forward"): [-log_two, log_two],
        ("k2", "reverse"): [log_two**2 / 2] * 2,
        ("k2", "forward"): [log_two**2 / 2] * 2,
        ("k3", "reverse"): [0.5 - 1 + log_two, 2 - 1 - log_two],
        ("k3", "forward"): [2 - 1 - log_two, 0.5 - 1 + log_two],
    }
    for (estimator, direction), expected in cases.items():
        result = kl_estimate(new, ref, estimator, direction)
        torch.testing.assert_close(result, torch.tensor([[expected]]), msg=f"{estimator} {direction}")


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased_on_samples_of_the_first_distribution(estimator, direction):
    # The expectation is a sum over the pool, so no sampling is needed.
    policy, reference = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
    sampled_from = policy if direction == "reverse" else reference
    expectation = (sampled_from.exp() * kl_estimate(policy, reference, estimator, direction)).sum()
    exact = exact_kl(policy.view(1, 1, 1, 3), reference.view(1, 1, 1, 3), direction).squeeze()
    torch.testing.assert_close(expectation, exact)


def test_k3_on_logged_beams_is_neither_kl_and_each_form_explodes_on_its_own_side():
    ref = torch.tensor([math.log(1e-4), math.log(0.5)])
    moved = torch.tensor([math.log(0.5), math.log(1e-4)])  # the first beam gained mass, the second lost it
    reverse, forward = kl_estimate(moved, ref), kl_estimate(moved, ref, direction="forward")
    assert reverse[1] > 1000 > 10 > reverse[0] and forward[0] > 1000 > 10 > forward[1]
    policy, reference = (x.exp() / x.exp().sum() for x in (moved, ref))
    exact = exact_kl(policy.log().view(1, 1, 1, 2), reference.log().view(1, 1, 1, 2))
    assert exact.item() < 10


@given(
    st.lists(st.floats(min_value=-1e30, max_value=0), min_size=4, max_size=4),
    st.sampled_from(["k1", "k3"]),
    st.sampled_from(["reverse", "forward"]),
)
@settings(deadline=None, max_examples=50)
def test_estimates_are_finite_for_any_finite_log_probs(values, estimator, direction):
    new = torch.tensor(values[:2]).requires_grad_()
    estimate = kl_estimate(new, torch.tensor(values[2:]), estimator, direction)
    assert estimate.isfinite().all()
    assert torch.autograd.grad(estimate.sum(), new)[0].isfinite().all()
    if estimator == "k3":
        assert (estimate >= 0).all()


def test_estimates_ignore_padding():
    new = torch.tensor([-1.0, NAN, -INF]).requires_grad_()
    estimate = kl_estimate(new, torch.tensor([-2.0, -1.0, NAN]), sequence_mask=torch.tensor([True, False, False]))
    estimate.sum().backward()
    assert estimate[1:].tolist() == [0.0, 0.0] and new.grad[1:].tolist() == [0.0, 0.0]
    assert estimate[0] > 0 and new.grad[0] != 0


def test_bounded_log_ratio_keeps_values_and_gradients():
    x = torch.tensor([-0.5, 0.3, 25.0, -300.0], dtype=torch.float64, requires_grad=True)
    bounded = bound_log_ratio(x)
    assert bounded.tolist() == [-0.5, 0.3, 20.0, -20.0]
    bounded.exp().sum().backward()
    torch.testing.assert_close(x.grad, bounded.detach().exp())  # never zero: a beam that ran away can be pushed back


def test_entropy_of_uniform_and_certain_steps():
    available = torch.tensor([4, 2, 1])
    steps = torch.full((1, 1, 3, 4), -INF)
    for t, count in enumerate(available.tolist()):
        steps[0, 0, t, :count] = -math.log(count)
    torch.testing.assert_close(step_entropy(steps)[0, 0], available.float().log())
    torch.testing.assert_close(step_entropy(steps, normalize=True)[0, 0], torch.tensor([1.0, 1.0, 0.0]))
    skewed = torch.tensor([0.9, 0.1, 0.0]).log().view(1, 1, 1, 3)
    assert step_entropy(skewed).item() == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1))


def test_half_inputs_are_computed_in_float32_even_under_autocast():
    steps = torch.randn(1, 2, 2, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1).bfloat16()
    reference = torch.randn(1, 2, 2, 5, generator=torch.Generator().manual_seed(1)).log_softmax(-1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = exact_kl(steps, reference), step_entropy(steps), kl_estimate(steps[..., 0], reference[..., 0])
    assert all(result.dtype == torch.float32 for result in results)
    torch.testing.assert_close(results[0], exact_kl(steps.float(), reference.float()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: exact_kl(x, x, "backward"), "direction='backward'"),
        (lambda x: exact_kl(x, x[..., :2]), "same pool"),
        (lambda x: kl_estimate(x, x, "k4"), "estimator='k4'"),
        (lambda x: kl_estimate(x, x[..., :2]), "must be equal"),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 1, 1, 3))
