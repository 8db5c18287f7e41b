import itertools
import math

import pytest
import torch
from scipy.stats import chisquare
from small_selectors import make_batch, make_selector


def pools(**options) -> dict:
    batch = make_batch(**options)
    del batch["sequences"]
    return batch


@torch.no_grad()
def ranked(selector, inputs, shots, **options):
    """All ordered sequences of each query, and their log-probabilities from `forward`."""
    pool = inputs["candidate_embeds"].shape[1]
    sequences = torch.tensor(list(itertools.permutations(range(pool), shots)))
    batch = inputs["query_embeds"].shape[0]
    return sequences, selector(**inputs, sequences=sequences.expand(batch, -1, -1), **options).log_probs.sum(-1)


@torch.no_grad()
def test_greedy_takes_the_most_probable_candidate_of_each_step(variant):
    selector, inputs = make_selector(variant), pools(queries=4)
    picks = selector.select(**inputs, num_shots=3)
    assert picks.sequences.shape == (4, 1, 3) and picks.scores.shape == (4, 1)
    output = selector(**inputs, sequences=picks.sequences, return_step_log_probs=True)
    assert torch.equal(output.step_log_probs.argmax(-1), picks.sequences)
    torch.testing.assert_close(output.log_probs.sum(-1), picks.scores)


def test_a_beam_of_all_sequences_ranks_them_as_forward_does(variant):
    selector, inputs = make_selector(variant), pools()
    sequences, scores = ranked(selector, inputs, shots=3)
    picks = selector.select(**inputs, num_shots=3, num_beams=60, num_return_sequences=60)
    best = scores.sort(descending=True)
    torch.testing.assert_close(picks.scores, best.values)
    assert torch.equal(picks.sequences, sequences[best.indices])


def test_a_narrow_beam_is_the_search_by_hand():
    selector, inputs = make_selector(seed=3), pools(queries=1, pool=6)
    beams = [()]
    for step in range(3):
        grown = [(*beam, pick) for beam in beams for pick in range(6) if pick not in beam]
        with torch.no_grad():
            scores = selector(**inputs, sequences=torch.tensor([grown])).log_probs.sum(-1)[0]
        best = scores.topk(min(2, len(grown)))
        beams = [grown[i] for i in best.indices.tolist()]
        assert len(beams) == 2, step
    picks = selector.select(**inputs, num_shots=3, num_beams=2, num_return_sequences=2)
    assert picks.sequences[0].tolist() == [list(beam) for beam in beams]
    torch.testing.assert_close(picks.scores[0], best.values)
    assert torch.equal(selector.select(**inputs, num_shots=3, num_beams=2).sequences, picks.sequences[:, :1])


def test_a_beam_finds_what_greedy_misses():
    inputs = pools(queries=1)
    found = 0
    for seed in range(20):
        selector = make_selector(seed=seed)
        sequences, scores = ranked(selector, inputs, shots=2)
        greedy, beam = (selector.select(**inputs, num_shots=2, num_beams=width) for width in (1, 5))
        assert beam.scores.item() == pytest.approx(scores.max().item())  # 5 beams of 5 candidates keep every pick
        assert beam.sequences[0, 0].tolist() == sequences[scores.argmax()].tolist()
        found += beam.scores.item() > greedy.scores.item() + 1e-9
    assert found > 0


def test_places_for_which_there_is_no_sequence_are_marked():
    selector, inputs = make_selector(), pools(queries=1, pool=3)
    picks = selector.select(**inputs, num_shots=3, num_beams=10, num_return_sequences=10)
    assert picks.scores.isfinite().tolist() == [[True] * 6 + [False] * 4]
    assert not picks.scores.isnan().any() and (picks.scores[0, 6:] == -math.inf).all()
    assert {tuple(s) for s in picks.sequences[0, :6].tolist()} == set(itertools.permutations(range(3)))


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 4}, {"do_sample": True, "num_return_sequences": 50}])
def test_no_decoding_repeats_or_picks_padding(variant, decoding):
    selector, inputs = make_selector(variant), pools()
    mask = torch.tensor([[True, False, True, True, True], [True, True, False, False, True]])
    picks = selector.select(**inputs, candidate_mask=mask, num_shots=3, **decoding)
    for query, allowed in enumerate(({0, 2, 3, 4}, {0, 1, 4})):
        for sequence in picks.sequences[query].tolist():
            assert len(set(sequence)) == 3 and set(sequence) <= allowed
    log_probs = selector(**inputs, candidate_mask=mask, sequences=picks.sequences).log_probs.sum(-1)
    torch.testing.assert_close(log_probs, picks.scores)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_samples_are_as_frequent_as_they_are_probable(temperature):
    selector, inputs = make_selector("v3-prior-sets", seed=1), pools(queries=2, pool=4)
    sequences, scores = ranked(selector, inputs, shots=2, temperature=temperature)
    draws = selector.select(
        **inputs,
        num_shots=2,
        do_sample=True,
        num_return_sequences=20_000,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    names = {tuple(sequence): number for number, sequence in enumerate(sequences.tolist())}
    for query in range(2):
        drawn = torch.tensor([names[tuple(sequence)] for sequence in draws.sequences[query].tolist()])
        torch.testing.assert_close(draws.scores[query], scores[query][drawn])
        expected = scores[query].exp() * 20_000
        common = expected > 5
        observed = torch.bincount(drawn, minlength=len(sequences))
        observed = torch.cat([observed[common], observed[~common].sum()[None] + 1])  # +1: never an expected zero
        expected = torch.cat([expected[common], expected[~common].sum()[None] + 1])
        assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
    assert (draws.scores.diff() <= 0).all()


def test_sampling_is_reproducible_by_its_generator():
    selector, inputs = make_selector(), pools()
    options = {"num_shots": 2, "do_sample": True, "num_return_sequences": 20}

    def draw(seed):
        return selector.select(**inputs, **options, generator=torch.Generator().manual_seed(seed)).sequences

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_the_pool_may_be_used_up_but_not_exceeded(variant):
    selector, inputs = make_selector(variant), pools(pool=3)
    assert selector.select(**inputs, num_shots=3).sequences.sort(-1).values.tolist() == [[[0, 1, 2]]] * 2
    with pytest.raises(ValueError, match="num_shots=4 is more than the 3 candidates of the smallest pool"):
        selector.select(**inputs, num_shots=4)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        with pytest.raises(ValueError, match="num_shots=3 is more than the 2 candidates"):
            selector.select(**inputs, candidate_mask=mask, num_shots=3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "num_beams": 2}, "num_beams=2 with do_sample=True"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 is more than num_beams=1"),
        ({"num_shots": 0}, "num_shots=0 must be at least 1"),
        ({"num_beams": 0}, "num_beams=0 must be at least 1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"temperature": math.nan}, "temperature=nan must be above 0"),
    ],
)
def test_contradictory_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_selector().select(**pools(), **options)


def test_shared_candidates_are_selected_from_by_position_in_the_pool():
    selector, inputs = make_selector(), pools()
    unique = inputs["candidate_embeds"].flatten(0, 1)
    indices = torch.arange(10).view(2, 5).flip(0)
    own = selector.select(inputs["query_embeds"], unique[indices], num_shots=2, num_beams=3, num_return_sequences=3)
    shared = selector.select(
        inputs["query_embeds"],
        unique,
        candidate_indices=indices,
        num_shots=2,
        num_beams=3,
        num_return_sequences=3,
    )
    assert torch.equal(own.sequences, shared.sequences)
    torch.testing.assert_close(own.scores, shared.scores)


def test_selecting_keeps_no_graph():
    picks = make_selector().select(**pools())
    assert not picks.scores.requires_grad
