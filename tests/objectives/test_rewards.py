import math

import pytest
import torch
import torch.nn.functional as F

from lever_grpo.objectives import (
    REWARD_PRESETS,
    combine_rewards,
    group_advantages,
    normalize_rewards_zscore,
    reward_from_columns,
    sequence_coherence,
    sequence_diversity,
    tied_groups,
)


NAN = float("nan")

# One right and one wrong answer, under the names that Lever-Plus files use.
COLUMNS = {
    "vqa_correct": torch.tensor([[1.0, 0.0]]),
    "vqa_acc_score": torch.tensor([[0.9, 0.3]]),
    "vqa_gt_prob": torch.tensor([[0.5, 0.2]]),
    "vqa_rel_score": torch.tensor([[0.4, 0.8]]),
}


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("hard_plus_soft", [1.9, 0.3]),
        ("hard_plus_soft_v2", [2.9, 0.3]),
        ("separated", [2.9, 0.3]),
        ("hard_only", [1.0, 0.0]),
        ("soft_only", [0.9, 0.3]),
        ("hard01_plus_gtprob", [1.5, 0.2]),
        ("hard_plus_gtprob_plus_rel", [1.5, 0.2 + 0.1 * 0.8]),
    ],
)
def test_presets_by_hand(preset, expected):
    torch.testing.assert_close(reward_from_columns(COLUMNS, preset), torch.tensor([expected]))
    short = {name.removeprefix("vqa_").removesuffix("_score"): column for name, column in COLUMNS.items()}
    short["accuracy"] = short.pop("acc")
    torch.testing.assert_close(reward_from_columns(short, preset), torch.tensor([expected]))


def test_every_preset_is_tested_by_hand():
    tested = test_presets_by_hand.pytestmark[0].args[1]
    assert {preset for preset, _ in tested} == set(REWARD_PRESETS)


def test_separated_splits_by_the_answer_where_v2_doubles_it():
    soft = {"correct": torch.tensor([0.6, 0.4, NAN]), "accuracy": torch.tensor([0.5, 0.5, 0.5])}
    torch.testing.assert_close(reward_from_columns(soft, "separated")[:2], torch.tensor([2.5, 0.5]))
    torch.testing.assert_close(reward_from_columns(soft, "hard_plus_soft_v2")[:2], torch.tensor([1.7, 1.3]))
    assert reward_from_columns(soft, "separated")[2].isnan()  # unknown is not wrong


def test_columns_and_weights():
    torch.testing.assert_close(reward_from_columns(COLUMNS, "vqa_gt_prob"), COLUMNS["vqa_gt_prob"])
    weighted = reward_from_columns(COLUMNS, {"vqa_correct": 2.0, "vqa_gt_prob": -1.0})
    torch.testing.assert_close(weighted, torch.tensor([[1.5, -0.2]]))
    with_unknown = {**COLUMNS, "other": torch.full((1, 2), NAN)}
    torch.testing.assert_close(
        reward_from_columns(with_unknown, {"vqa_correct": 1.0, "other": 0.0}), COLUMNS["vqa_correct"]
    )
    assert reward_from_columns(with_unknown, {"vqa_correct": 1.0, "other": 0.1}).isnan().all()
    rel = reward_from_columns(COLUMNS, "hard_plus_gtprob_plus_rel", rel_weight=1.0)
    torch.testing.assert_close(rel, torch.tensor([[1.5, 1.0]]))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("hard_plus_soft", "reward 'hard_plus_soft' needs the column 'correct' or 'vqa_correct', the log has: score"),
        ("hard_plus_softt", "'hard_plus_softt' is no preset .*the log has: score"),
        ({"score": 1.0, "acc": 1.0}, "needs the column 'acc', the log has: score"),
        ({}, "no weights"),
    ],
)
def test_a_missing_column_names_what_there_is(reward, message):
    with pytest.raises(ValueError, match=message):
        reward_from_columns({"score": torch.ones(1, 2)}, reward)


def embeddings():
    generator = torch.Generator().manual_seed(0)
    query, pool = torch.randn(2, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    sequences = torch.tensor([[[0, 1, 2], [3, 0, 1], [2, 0, 0]], [[1, 3, 2], [0, 0, 0], [2, 3, 0]]])
    mask = torch.tensor([[[1, 1, 1], [1, 1, 1], [1, 0, 0]], [[1, 1, 1], [0, 0, 0], [1, 1, 0]]]).bool()
    return query, pool, sequences, mask


def test_coherence_and_diversity_equal_a_loop_over_sequences_and_pairs():
    query, pool, sequences, mask = embeddings()
    coherence, diversity = torch.zeros(2, 3), torch.zeros(2, 3)
    for b in range(2):
        for g in range(3):
            picked = [pool[b, p] for p, real in zip(sequences[b, g], mask[b, g], strict=True) if real]
            if picked:
                coherence[b, g] = sum(F.cosine_similarity(query[b], d, dim=0) for d in picked) / len(picked)
            pairs = [F.cosine_similarity(x, y, dim=0) for i, x in enumerate(picked) for y in picked[:i]]
            if pairs:
                diversity[b, g] = 1 - sum(pairs) / len(pairs)
    torch.testing.assert_close(sequence_coherence(query, pool, sequences, mask), coherence)
    torch.testing.assert_close(sequence_diversity(pool, sequences, mask), diversity)


def test_sequence_rewards_ignore_padding_order_and_length_of_the_vectors():
    query, pool, sequences, mask = embeddings()
    coherence, diversity = sequence_coherence(query, pool, sequences, mask), sequence_diversity(pool, sequences, mask)
    other_padding = sequences.masked_fill(~mask, -100)
    garbage = torch.cat([3.0 * pool, torch.full((2, 1, 5), NAN)], 1)  # a padded candidate that nothing picks
    torch.testing.assert_close(sequence_coherence(0.1 * query, garbage, other_padding, mask), coherence)
    torch.testing.assert_close(sequence_diversity(garbage, other_padding, mask), diversity)
    flipped = sequences.flip(-1), mask.flip(-1)
    torch.testing.assert_close(sequence_coherence(query, pool, *flipped), coherence)
    torch.testing.assert_close(sequence_diversity(pool, *flipped), diversity)
    zero = torch.zeros_like(pool)
    assert not sequence_coherence(query, zero, sequences, mask).any()
    assert sequence_coherence(query.half(), pool.half(), sequences, mask).dtype == torch.float32


def test_coherence_needs_comparable_embeddings():
    query, pool, sequences, mask = embeddings()
    with pytest.raises(ValueError, match="4 wide, candidate embeddings 5"):
        sequence_coherence(query[:, :4], pool, sequences, mask)


LEVELS = {"beam": torch.tensor([[0.01, 0.02, 0.03]]), "task": torch.tensor([[1.0, 0.0, 0.0]])}


def test_combination_by_hand():
    weights = {"beam": 1.0, "task": 0.5}
    torch.testing.assert_close(combine_rewards(LEVELS, weights), torch.tensor([[0.51, 0.02, 0.03]]))
    # z(beam) = -1, 0, 1; z(task) = (2, -1, -1) / sqrt(3).
    third = 1 / math.sqrt(3)
    expected = torch.tensor([[-1 + third, -third / 2, 1 - third / 2]])
    torch.testing.assert_close(combine_rewards(LEVELS, weights, aggregation="normalize_then_sum"), expected)


def test_normalize_then_sum_makes_the_weights_independent_of_the_levels_scales():
    weights = {"beam": 1.0, "task": 0.5}
    scaled = {"beam": LEVELS["beam"] * 1e-6, "task": LEVELS["task"] * 1e6 + 5}
    for aggregation, equal in (("normalize_then_sum", True), ("sum_then_normalize", False)):
        results = [group_advantages(combine_rewards(x, weights, aggregation=aggregation)) for x in (LEVELS, scaled)]
        assert torch.allclose(*results, atol=1e-4) is equal
    # Of one level alone, both are the group's z-score.
    for aggregation in ("normalize_then_sum", "sum_then_normalize"):
        alone = combine_rewards({"beam": LEVELS["beam"]}, {"beam": 2.0}, aggregation=aggregation)
        torch.testing.assert_close(group_advantages(alone), normalize_rewards_zscore(LEVELS["beam"]))


def test_levels_that_cancel_are_no_contrast():
    task = (torch.rand(200, 7, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    levels, weights = {"beam": 1 - task, "task": task}, {"beam": 1.0, "task": 1.0}
    combined = combine_rewards(levels, weights, aggregation="normalize_then_sum")
    assert not combined.any() and tied_groups(combined).all()
    assert combine_rewards(levels, {"beam": 1.0, "task": 0.9}, aggregation="normalize_then_sum").any()


def test_a_tied_level_adds_nothing_when_normalised():
    tied = {**LEVELS, "diversity": torch.full((1, 3), 0.7)}
    combined = combine_rewards(tied, {"beam": 1.0, "task": 0.5, "diversity": 9.0}, aggregation="normalize_then_sum")
    expected = combine_rewards(LEVELS, {"beam": 1.0, "task": 0.5}, aggregation="normalize_then_sum")
    torch.testing.assert_close(combined, expected)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_masked_beams_touch_nothing(aggregation):
    mask = torch.tensor([[True, True, True, False]])
    padded = {name: torch.cat([level, torch.tensor([[NAN]])], 1) for name, level in LEVELS.items()}
    weights = {"beam": 1.0, "task": 0.5}
    combined = combine_rewards(padded, weights, mask, aggregation)
    torch.testing.assert_close(combined[:, :3], combine_rewards(LEVELS, weights, aggregation=aggregation))
    assert combined[0, 3] == 0


@pytest.mark.parametrize(
    ("levels", "weights", "options", "message"),
    [
        (LEVELS, {"beam": 1.0}, {}, r"weights are for \['beam'\]"),
        (LEVELS, {"beam": 1.0, "tusk": 1.0}, {}, "tusk"),
        ({}, {}, {}, "levels are"),
        (LEVELS, {"beam": 1.0, "task": 1.0}, {"aggregation": "sum"}, "aggregation='sum'"),
        ({"beam": torch.tensor([[1.0, NAN]])}, {"beam": 1.0}, {}, r"level 'beam' is nan at \[0, 1\]"),
        ({**LEVELS, "task": torch.ones(1, 2)}, {"beam": 1.0, "task": 1.0}, {}, "different shapes"),
    ],
)
def test_errors_name_the_value(levels, weights, options, message):
    with pytest.raises(ValueError, match=message):
        combine_rewards(levels, weights, **options)


def test_a_level_of_weight_zero_is_not_read():
    broken = {**LEVELS, "task": torch.full((1, 3), NAN)}
    torch.testing.assert_close(combine_rewards(broken, {"beam": 1.0, "task": 0.0}), LEVELS["beam"])
