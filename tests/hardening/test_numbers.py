"""NaN, infinities, extreme scales and ties, from a file to the weights: an error that says where, or a number."""

import math
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpus import group, lines, put
from extremes import BEAMS, CASES, DTYPES, FILLERS, GROUPS, INF, LARGEST, NAN, SHOTS, pointer_steps, score_groups
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from planted import (
    POOL,
    WIDTH,
    Planted,
    assert_same_weights,
    make_selector,
    make_trainer,
    to_dataset,
    weights_of,
)
from safetensors.torch import load_file, save_file
from transformers import PrinterCallback, TrainerCallback

from lever_grpo import SelectorSFTConfig, SelectorSFTTrainer
from lever_grpo.data import BeamDataError, EmbeddingStore, load_beams
from lever_grpo.objectives import (
    compute_softmax_weights,
    effective_beams,
    exact_kl,
    group_advantages,
    group_policy_loss,
    kl_estimate,
    rce_loss,
    rewards_std,
    step_entropy,
    tied_groups,
)
from lever_grpo.objectives.advantages import SCALE_REWARDS
from lever_grpo.objectives.divergences import DIRECTIONS, KL_ESTIMATORS
from lever_grpo.objectives.policy_losses import IMPORTANCE_SAMPLING_LEVELS, LOSS_TYPES
from lever_grpo.trainer import last_checkpoint


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_loss = pytest.mark.parametrize("loss_type", LOSS_TYPES)


def examples(number):
    """The same examples in every run; what fails is small as it is."""
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def finite(*tensors):
    return all(tensor.isfinite().all() for tensor in tensors)


def check_gradient(loss, steps, live):
    """Finite, in every group; and none at all where nothing counts."""
    (gradient,) = torch.autograd.grad(loss.sum(), steps.logits)
    assert finite(loss, gradient)
    assert not gradient[~live].any()


# ---------------------------------------------------------------- objectives


@examples(150)
@given(score_groups(), st.sampled_from([1e-3, 0.5, 100.0]), st.booleans())
def test_weights_are_a_distribution_or_nothing(scores, temperature, normalize):
    values, mask = scores
    weights = compute_softmax_weights(values, temperature, mask, normalize)
    assert finite(weights) and (weights >= 0).all() and not weights[~mask].any()
    torch.testing.assert_close(weights.sum(-1), mask.any(-1).float())
    assert (effective_beams(weights) <= mask.sum(-1) + 1e-3).all()
    for row, weight, live in zip(values, weights, mask, strict=True):
        assert (weight[live][row[live].argsort()].diff() >= 0).all()  # a better beam never weighs less


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
@examples(60)
@given(score_groups(), st.sampled_from([5.0, None]), st.sampled_from([0.0, 0.5]), st.sampled_from([None, 1e-30, 1e30]))
def test_advantages_are_finite_and_zero_where_nothing_counts(scale_rewards, scores, clip, shift, std):
    values, mask = scores
    tied = tied_groups(values, mask)
    options = {"scale_rewards": scale_rewards, "baseline_shift": shift, "batch_std": std}
    advantages = group_advantages(values, mask, clip=clip, **options)
    assert not advantages.isnan().any() and not advantages[tied].any() and not advantages[~mask].any()
    if clip is not None or std != 1e-30:
        assert finite(advantages)
    live = torch.where(mask, values, 0.0).double()
    best, worst = (live.masked_fill(~mask, fill) for fill in (-INF, INF))
    spread, magnitude = best.amax(-1) - worst.amin(-1), live.abs().amax(-1)
    expected = ~(spread > 1e-6 * magnitude)  # the difference of nothing is -inf
    near = (spread / (1e-6 * magnitude) - 1).abs() < 0.01  # float32 may decide otherwise
    assert torch.equal(tied | near, expected | near)
    if scale_rewards in ("group", "rank"):  # whatever the scale, the best is told from the rest
        assert (advantages.amax(-1) >= 0.5)[~tied].all()


def test_differences_and_quotients_near_the_end_of_float32():
    values = torch.tensor([[LARGEST, 0.0, -LARGEST]])
    for scale_rewards in ("group", "rank"):
        assert group_advantages(values, scale_rewards=scale_rewards).tolist() == [[1.0, 0.0, -1.0]]
    for scale_rewards, std in (("none", None), ("batch", 1e-30)):
        assert group_advantages(values, scale_rewards=scale_rewards, batch_std=std).tolist() == [[5.0, 0.0, -5.0]]
    for normalize in (True, False):
        assert compute_softmax_weights(values, 1e-3, normalize=normalize)[0].tolist() == [1.0, 0.0, 0.0]
    for function in (group_advantages, compute_softmax_weights, tied_groups, rewards_std):
        with pytest.raises(ValueError, match=r"rewards\[0, 0\] is 1.7.*e\+38: .* at most 8.5e\+37; .*scale"):
            function(4 * values)


@examples(100)
@given(score_groups())
def test_the_std_of_all_scores_is_finite(scores):
    std = rewards_std(*scores)
    assert finite(std) and std >= 0


@pytest.mark.parametrize("level", IMPORTANCE_SAMPLING_LEVELS)
@each_loss
@examples(12)
@given(st.data())
def test_every_policy_loss_has_finite_gradients(loss_type, level, data):
    scores, beam_mask = data.draw(score_groups())
    dtype = data.draw(st.sampled_from(DTYPES))
    steps = data.draw(pointer_steps(beam_mask, dtype))
    old = data.draw(st.sampled_from([None, steps.picked(steps.reference)]))
    narrow = dtype == torch.float16 and loss_type in ("grpo", "dr_grpo")
    loss, stats = group_policy_loss(
        steps.picked(steps.logits),
        old,
        group_advantages(scores, beam_mask),
        steps.mask,
        beam_mask,
        loss_type=loss_type,
        importance_sampling_level=level,
        # a ratio of e^20 has no gradient in float16: in these two losses, only this bounds it there
        delta=data.draw(st.sampled_from([4.0] if narrow else [None, 4.0])),
        max_length=SHOTS,
        weights=compute_softmax_weights(scores, 1.0, beam_mask),
        length_normalize=data.draw(st.booleans()),
    )
    assert loss.dtype == torch.float32 and finite(*stats.values())
    check_gradient(loss, steps, beam_mask.any(-1))


@examples(60)
@given(st.data())
def test_reward_weighted_cross_entropy_has_finite_gradients(data):
    scores, beam_mask = data.draw(score_groups())
    steps = data.draw(pointer_steps(beam_mask, data.draw(st.sampled_from(DTYPES))))
    weights = compute_softmax_weights(scores, data.draw(st.sampled_from([1e-3, 2.0])), beam_mask)
    loss = rce_loss(steps.picked(steps.logits), weights, steps.mask, data.draw(st.booleans()))
    check_gradient(loss, steps, beam_mask.any(-1))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("estimator", ["exact", *KL_ESTIMATORS])
@examples(30)
@given(st.data())
def test_every_divergence_has_finite_gradients(estimator, direction, data):
    _, beam_mask = data.draw(score_groups())
    # the exponent of k3 is bounded for float32 and bfloat16, not for float16
    dtype = data.draw(st.sampled_from(DTYPES[:2] if estimator == "k3" else DTYPES))
    steps = data.draw(pointer_steps(beam_mask, dtype))
    if estimator == "exact":
        distributions = steps.distribution(steps.logits), steps.distribution(steps.reference)
        kl = exact_kl(*distributions, direction, steps.mask)
    else:
        picked = steps.picked(steps.logits), steps.picked(steps.reference)
        kl = kl_estimate(*picked, estimator, direction, steps.mask)
    assert kl.dtype == torch.float32 and not kl[~steps.mask].any()
    check_gradient(kl, steps, beam_mask.any(-1))


@examples(60)
@given(st.data())
def test_entropy_has_finite_gradients(data):
    _, beam_mask = data.draw(score_groups())
    steps = data.draw(pointer_steps(beam_mask, data.draw(st.sampled_from(DTYPES))))
    for normalize in (False, True):
        entropy = step_entropy(steps.distribution(steps.logits), normalize, steps.mask)
        assert (entropy >= 0).all() and (entropy <= (1.01 if normalize else math.log(POOL))).all()
        check_gradient(entropy, steps, beam_mask.any(-1))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_live_value_that_is_not_finite_is_an_error(bad):
    rewards = torch.tensor([[0.1, 0.2, 0.3], [0.1, bad, 0.3]])
    for function in (group_advantages, compute_softmax_weights, tied_groups, rewards_std):
        with pytest.raises(ValueError, match=rf"rewards\[1, 1\] is {bad}"):
            function(rewards)
    log_probs = torch.zeros(GROUPS, BEAMS, SHOTS)
    mask = torch.ones_like(log_probs, dtype=torch.bool)
    advantages, weights = torch.ones(GROUPS, BEAMS), torch.full((GROUPS, BEAMS), 1 / BEAMS)
    poisoned = log_probs.clone()
    poisoned[1, 2, 0] = bad
    for loss_type in LOSS_TYPES:
        for new, old, name in ((poisoned, log_probs, "log_probs"), (log_probs, poisoned, "old_log_probs")):
            with pytest.raises(ValueError, match=rf"^{name}\[1, 2, 0\] is {bad}"):
                group_policy_loss(
                    new, old, advantages, mask, mask[..., 0], loss_type=loss_type, weights=weights, max_length=SHOTS
                )
    with pytest.raises(ValueError, match=rf"log_probs\[1, 2, 0\] is {bad}"):
        rce_loss(poisoned, weights, mask)


# ---------------------------------------------------------------- training


class Finite(TrainerCallback):
    """Looks at every weight after every step."""

    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps += 1
        assert finite(*model.parameters())


def train(trainer, steps):
    watch = Finite()
    trainer.add_callback(watch)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert watch.steps == trainer.state.global_step == steps
    logs = [log for log in trainer.state.log_history if "learning_rate" in log]
    for log in trainer.state.log_history:
        assert all(math.isfinite(value) for value in log.values()), log
    return logs


def changed(data, *cases, rows=8):
    """A log of the rows, the cases in turn."""
    cases = cases or tuple(CASES.values())
    return to_dataset([cases[i % len(cases)].change(row, i) for i, row in enumerate(data.rows[:rows])])


def make_extreme(folder, planted, dataset, **options):
    """RCE, early and late GRPO on a log."""
    options = {"eval_strategy": "no", "save_strategy": "no", "per_device_train_batch_size": len(dataset), **options}
    return make_trainer(folder, planted, make_selector(similarity_prior=True), train=dataset, **options)


@each_case
def test_grpo_ends_with_finite_weights_and_counts_ties(case, planted, tmp_path):
    trainer = make_extreme(tmp_path, planted, changed(planted, case))
    before = weights_of(trainer.model)
    logs = train(trainer, steps=3)
    assert [log["frac_reward_zero_std"] for log in logs] == [case.tied] * 3
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer.model).items())
    late = logs[-1]
    if case.tied == 1:  # nothing to compare
        assert late["grad_norm"] == 0 and "policy_loss" not in late
    else:
        assert late["grad_norm"] > 0 and 0 < late["advantage_std"] < 5


@pytest.mark.parametrize(
    "loss_type, scale_rewards, names",
    [*((name, "group", ["tiny", "huge"]) for name in LOSS_TYPES), ("grpo", "batch", ["tiny"])],
)
def test_the_scale_of_the_scores_changes_nothing(loss_type, scale_rewards, names, planted, tmp_path):
    found = []
    for dataset in (to_dataset(planted.rows[:8]), changed(planted, *(CASES[name] for name in names))):
        trainer = make_extreme(tmp_path, planted, dataset, loss_type=loss_type, scale_rewards=scale_rewards)
        train(trainer, steps=3)
        found.append(weights_of(trainer.model))
    assert_same_weights(*found)


@pytest.mark.parametrize("loss_type, bf16", [*((name, False) for name in LOSS_TYPES), ("grpo", True)])
def test_every_loss_trains_on_all_extremes_at_once(loss_type, bf16, planted, tmp_path):
    options = {"loss_type": loss_type, "bf16": bf16, "adaptive_beta": True}
    logs = train(make_extreme(tmp_path, planted, changed(planted, rows=24), **options), steps=3)
    assert all(0 < log["frac_reward_zero_std"] < 1 for log in logs)


@pytest.mark.parametrize("loss_type, level", [*((name, "token") for name in LOSS_TYPES), ("grpo", "joint")])
def test_ratios_that_would_overflow_leave_finite_weights(loss_type, level, planted, tmp_path):
    options = {"loss_type": loss_type, "importance_sampling_level": level, "old_policy_refresh": "never"}
    trainer = make_extreme(tmp_path, planted, to_dataset(planted.rows[:8]), rce_epochs=0, **options)
    with torch.no_grad():  # π_old and π all but rule out what the other one picks: log-ratios of hundreds
        for sign, policy in ((1.0, trainer.model), (-1.0, trainer.old_policy)):
            policy.prior.mix.fill_(sign)
            policy.prior.log_scale.fill_(5.0)
    logs = train(trainer, steps=2)
    if loss_type not in ("rwr", "listwise_kl", "asymre"):
        assert max(log["ratio_mean"] for log in logs) > 1e6


@pytest.mark.parametrize("scale_rewards", SCALE_REWARDS)
def test_every_scale_of_advantages_trains_on_all_extremes_at_once(scale_rewards, planted, tmp_path):
    trainer = make_extreme(tmp_path, planted, changed(planted, rows=24), scale_rewards=scale_rewards)
    train(trainer, steps=3)


@pytest.mark.parametrize("options", [{"rce_normalize": False}, {"kl_estimator": "k3", "kl_direction": "forward"}])
def test_other_options_train_on_all_extremes_at_once(options, planted, tmp_path):
    train(make_extreme(tmp_path, planted, changed(planted, rows=24), **options), steps=3)


@pytest.mark.parametrize("names", [["all_equal"], ["one_beam"], ["as_far_apart_as_can_be"], CASES])
def test_sft_ends_with_finite_weights(names, planted, tmp_path):
    args = SelectorSFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=1,
        num_beams=2,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    dataset = changed(planted, *(CASES[name] for name in names), rows=24)
    trainer = SelectorSFTTrainer(make_selector(), args, planted.collator, dataset)
    before = weights_of(trainer.model)
    logs = train(trainer, steps=3)
    assert all(log["grad_norm"] > 0 for log in logs)  # ties are imitated, too
    assert any(not torch.equal(value, before[name]) for name, value in weights_of(trainer.model).items())


def test_extremes_are_judged_with_finite_numbers(planted, tmp_path):
    cases = [case for name, case in CASES.items() if "without_beams" not in name]
    trainer = make_trainer(tmp_path, planted, validation=changed(planted, *cases, rows=24), eval_on_start=False)
    metrics = trainer.evaluate()
    assert metrics["eval_frac_reward_zero_std"] > 0 and all(math.isfinite(value) for value in metrics.values())


def test_groups_without_beams_are_masked(planted, tmp_path):
    """Beside others they change nothing, and a batch of them alone has no loss and no gradient."""
    rows = planted.rows[:4]
    empty = [CASES["every_second_group_without_beams"].change(row, 1) for row in planted.rows[4:6]]
    trainer = make_trainer(tmp_path, planted)
    for stage in ("rce", "grpo_late"):
        trainer.policy_control.stage = stage
        gradients = []
        for some in (rows, rows + empty, empty):
            trainer.model.zero_grad()
            loss = trainer.compute_loss(trainer.model, planted.collator(list(to_dataset(some))))
            loss.backward()
            flat = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            gradients.append(torch.cat([*flat, loss[None]]))
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
        assert gradients[0].any() and not gradients[2].any()


def test_a_query_without_candidates_is_named(planted):
    empty = {**planted.rows[1], "candidate_ids": [], "sequences": [], "scores": [], "survived": []}
    with pytest.raises(
        BeamDataError, match=rf"query {empty['query_id']}: expected at least one candidate, found none"
    ):
        planted.collator([planted.rows[0], {**empty, "columns": {"correct": []}}])


@pytest.mark.parametrize("options", [{}, {"similarity_prior": True, "num_set_layers": 1}])
def test_a_pool_that_is_masked_altogether_has_finite_gradients(options):
    """Padding of a batch, as a selector sees it: its own steps are masked, and other queries do not notice."""
    model = make_selector(**options)
    pool, query = torch.randn(2, POOL, WIDTH), torch.randn(2, WIDTH)
    mask = torch.tensor([[True] * POOL, [False] * POOL])
    sequence_mask = mask[:, None, :2]
    found = []
    for rows in (slice(0, 1), slice(0, 2)):
        inputs = {"query_embeds": query[rows], "candidate_embeds": pool[rows], "candidate_mask": mask[rows]}
        sequences = torch.zeros(2, 1, 2, dtype=torch.long)
        sequences[0, 0, 1] = 1
        model.zero_grad()
        inputs |= {"sequences": sequences[rows], "sequence_mask": sequence_mask[rows]}
        output = model(**inputs, return_step_log_probs=True)
        entropy = step_entropy(output.step_log_probs, sequence_mask=output.step_mask)
        (entropy.sum() - output.log_probs.sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert finite(output.log_probs, found[-1]) and not output.log_probs[1:].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- logs


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_scores_of_our_own_format_name_file_record_and_field(value, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(lines(group(query_id=6), put(value, group(scores=[1.0, "@"])) + "\n"))
    with pytest.raises(BeamDataError, match=r"log\.jsonl: line 2, query 7, field 'scores\[1\]': expected a finite"):
        load_beams(path, cache_dir=tmp_path / "cache")


def test_gains_that_are_not_finite_name_file_record_and_field(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(put("NaN", group(shot_scores=[[0.5, "@"], [0.5]])) + "\n")
    with pytest.raises(BeamDataError, match=r"log\.jsonl: line 1, query 7, field 'shot_scores\[0\].*finite"):
        load_beams(path, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("value", [NAN, INF])
def test_parquet_scores_name_file_record_and_field(value, tmp_path):
    path = tmp_path / "log.parquet"
    columns = {"query_id": [7], "candidate_ids": [[10, 11]], "sequences": [[[0], [1]]], "scores": [[1.0, value]]}
    pq.write_table(pa.table(columns), path)
    with pytest.raises(BeamDataError, match=r"log\.parquet: row 0, query 7, field 'scores\[1\]': expected a finite"):
        load_beams(path, cache_dir=tmp_path / "cache")


def test_half_precision_scores_in_parquet_are_read_as_they_are(tmp_path):
    scores = np.array([-0.9, -1.0, 6e4, 6e-8], dtype=np.float16)
    columns = {
        "query_id": pa.array([7]),
        "candidate_ids": pa.array([[10, 11, 12, 13]]),
        "sequences": pa.array([[[0], [1], [2], [3]]]),
        "scores": pa.array([scores], pa.list_(pa.float16())),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    (row,) = load_beams(tmp_path / "log.parquet", cache_dir=tmp_path / "cache")
    assert row["scores"] == scores.astype(float).tolist()


@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-300, 1e300])
def test_scores_of_any_scale_are_read_to_the_bit(scale, tmp_path):
    scores = [-0.9 * scale, 0.1 * scale]
    (tmp_path / "log.jsonl").write_text(lines(group(scores=scores)))
    (row,) = load_beams(tmp_path / "log.jsonl", cache_dir=tmp_path / "cache")
    assert row["scores"] == scores


@pytest.mark.parametrize("value", [1e39, -1e300, INF])
def test_scores_beyond_float32_name_the_query(value, planted):
    rows = [planted.rows[0], {**planted.rows[1], "scores": [value, *planted.rows[1]["scores"][1:]]}]
    with pytest.raises(
        BeamDataError, match=rf"query {rows[1]['query_id']}: .*'scores'.*float32.*found {re.escape(f'{value:g}')}"
    ):
        planted.collator(rows)


# ---------------------------------------------------------------- embeddings


def poisoned(value, dtype=np.float32):
    values = Planted().embeddings.astype(dtype)
    values[5, 1] = value
    return values


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_embeddings_that_are_not_finite_name_the_row(value, dtype, tmp_path):
    np.save(tmp_path / "text.npy", poisoned(value, dtype))
    save_file({"text": torch.from_numpy(poisoned(value, dtype))}, tmp_path / "e.safetensors")
    for file in ("text.npy", "e.safetensors"):
        store = EmbeddingStore.open(tmp_path / file)
        message = "embeddings 'text': expected finite numbers, found NaN or infinity in 1 rows: 5"
        with pytest.raises(BeamDataError, match=message):
            store.check_finite()
        with pytest.raises(BeamDataError, match=message):
            store.gather([4, 5, 5], ["text"])
        assert np.isfinite(store.gather([4, 6], ["text"])).all()  # nobody is told of what nobody reads


def test_embeddings_beyond_float32_name_the_row():
    store = EmbeddingStore({"text": poisoned(1e300, np.float64)})
    with pytest.raises(BeamDataError, match="'text': .*in 1 rows: 5"):
        store.gather([5], ["text"])


def test_training_on_bad_embeddings_names_the_row(tmp_path):
    data = Planted()
    row = data.rows[0]["candidate_ids"][0]
    data.embeddings[row, 2] = NAN
    trainer = make_extreme(tmp_path, data, data.train)
    before = weights_of(trainer.model)
    with pytest.raises(BeamDataError, match=f"'text': expected finite numbers.*in 1 rows: {row}"):
        trainer.train()
    assert_same_weights(weights_of(trainer.model), before)


@pytest.mark.parametrize("options", [{}, {"similarity_prior": True, "num_set_layers": 1}])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("side", ["query_embeds", "candidate_embeds"])
def test_a_bad_embedding_reaches_its_own_query_alone(side, value, options):
    model = make_selector(**options).eval()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "query_embeds": torch.randn(2, WIDTH, generator=generator),
        "candidate_embeds": torch.randn(2, POOL, WIDTH, generator=generator),
        "sequences": torch.tensor([[[0, 1]], [[0, 1]]]),
    }
    expected = model(**inputs).log_probs
    inputs[side] = inputs[side].clone()
    inputs[side][1, ..., 0] = value
    log_probs = model(**inputs).log_probs
    assert torch.equal(log_probs[0], expected[0]) and log_probs[1].isnan().all()  # not hidden
    with pytest.raises(ValueError, match=r"log_probs\[1, 0, 0\] is nan"):
        rce_loss(log_probs, torch.ones(2, 1), torch.ones(2, 1, 2, dtype=torch.bool))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}])
def test_nothing_is_picked_by_a_bad_embedding(options):
    query, pool = torch.zeros(2, WIDTH), torch.randn(2, POOL, WIDTH)
    query[1, 0] = NAN
    with pytest.raises(ValueError, match="query 1 of the batch.*NaN"):
        make_selector().eval().select(query_embeds=query, candidate_embeds=pool, num_shots=2, **options)


@pytest.mark.parametrize("filler", FILLERS)
def test_what_a_masked_candidate_holds_touches_nothing(filler):
    model = make_selector(similarity_prior=True, num_set_layers=1)
    pool, mask = torch.randn(1, POOL, WIDTH), torch.tensor([[True] * (POOL - 1) + [False]])
    inputs = {"query_embeds": torch.randn(1, WIDTH), "candidate_mask": mask, "sequences": torch.tensor([[[0, 1]]])}
    found = []
    for value in (0.0, filler):
        candidates = pool.masked_fill(~mask.unsqueeze(-1), value)
        model.zero_grad()
        output = model(**inputs, candidate_embeds=candidates)
        output.log_probs.sum().backward()
        found.append([output.log_probs, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert finite(*found[0]) and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# ---------------------------------------------------------------- gradients


class Poison(TrainerCallback):
    """Makes the gradient of one weight something else in the third step."""

    def __init__(self, model, value):
        self.active = False
        weight = model.query_proj.weight
        weight.register_hook(lambda gradient: torch.full_like(gradient, value) if self.active else gradient)

    def on_step_begin(self, args, state, control, **kwargs):
        self.active = state.global_step == 2


@pytest.mark.parametrize("value, max_grad_norm", [(NAN, 1.0), (INF, 1.0), (NAN, 0.0)])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(value, max_grad_norm, planted, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_grad_norm": max_grad_norm}
    options["per_device_train_batch_size"] = 8
    trainer = make_extreme(tmp_path, planted, planted.train, **options)
    trainer.add_callback(Poison(trainer.model, value))
    seen = []
    compute_loss = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        seen.append(inputs["query_ids"].tolist())
        return compute_loss(model, inputs, **kwargs)

    trainer.compute_loss = watched
    with pytest.raises(FloatingPointError, match="step 3") as caught:
        trainer.train()
    assert len(seen) == 3 and all(re.search(rf"\b{query}\b", str(caught.value)) for query in seen[-1])
    assert finite(*trainer.model.parameters())
    last = tmp_path / "checkpoint-2"
    assert last_checkpoint(tmp_path) == str(last)
    assert_same_weights(weights_of(trainer.model), load_file(last / "model.safetensors"))


def test_a_gradient_that_overflows_by_itself_stops_before_the_weights(planted, tmp_path):
    options = {"rce_epochs": 0, "scale_rewards": "none", "advantage_clip": None, "rce_learning_rate": 0.0}
    trainer = make_extreme(tmp_path, planted, changed(planted, CASES["huge"]), **options)
    before = weights_of(trainer.model)
    with pytest.raises(FloatingPointError, match="step 1"):
        trainer.train()
    assert_same_weights(weights_of(trainer.model), before)
