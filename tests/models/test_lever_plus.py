"""What the Lever-Plus selectors have of their own; that they are the public functions: tests/convert."""

import math

import pytest
import torch
from planted import make_trainer, weights_of
from small_selectors import make_batch, make_selector
from transformers import AutoConfig

from lever_grpo.models import LeverPlusSelector, LeverPlusSelectorConfig, config_from_preset


@torch.no_grad()
def test_a_case_by_hand():
    """Identity projections of unit vectors in the plane: the logits are 10 times the cosines."""
    config = LeverPlusSelectorConfig(embed_dim=2, hidden_dim=2, pick_update="average")
    selector = LeverPlusSelector(config).eval()
    for module in (selector.query_proj, selector.candidate_proj):
        module.weight.copy_(torch.eye(2))
    attention = selector.layers[0]
    attention.o_proj.weight.zero_()  # attention adds nothing; the norm makes (3, 1) the vector (1, -1)
    query, pool = torch.tensor([[3.0, 1.0]]), torch.tensor([[[2.0, 0.0], [0.0, 5.0], [-1.0, -1.0]]])
    output = selector(query, pool, sequences=torch.tensor([[[0, 1]]]), return_step_log_probs=True)
    first = torch.tensor([math.sqrt(0.5), -math.sqrt(0.5), 0.0]) * 10
    torch.testing.assert_close(output.step_log_probs[0, 0, 0], first.log_softmax(0), atol=1e-4, rtol=1e-4)
    # (1, -1) / sqrt(2) and (1, 0) meet at minus an eighth of a turn: 22.5 degrees below the axis
    down = math.radians(-22.5)
    second = torch.tensor([-math.inf, math.sin(down), -math.cos(down - math.radians(45))]) * 10
    torch.testing.assert_close(output.step_log_probs[0, 0, 1], second.log_softmax(0), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["lever-plus-v1", "lever-plus-v2"])
def test_without_an_update_the_second_pick_renormalises_the_first(variant):
    selector, batch = make_selector(variant, pick_update="none"), make_batch()
    steps = selector(**batch, return_step_log_probs=True).step_log_probs
    picked = batch["sequences"][..., :1]
    left = steps[:, :, 0].scatter(-1, picked, -math.inf).log_softmax(-1)
    torch.testing.assert_close(steps[:, :, 1], left)


@torch.no_grad()
def test_a_learned_weight_of_one_half_is_the_average():
    weighted = make_selector("lever-plus-v1", pick_update="weighted")
    average = make_selector("lever-plus-v1")
    weighted.load_state_dict(average.state_dict() | {"pick_update.weight": torch.zeros(1)})
    batch = make_batch()
    torch.testing.assert_close(weighted(**batch).log_probs, average(**batch).log_probs)
    weighted.pick_update.weight.fill_(30.0)  # keeps the query as it is
    unchanged = make_selector("lever-plus-v1", pick_update="none")
    unchanged.load_state_dict(average.state_dict())
    torch.testing.assert_close(weighted(**batch).log_probs, unchanged(**batch).log_probs)


@pytest.mark.parametrize(("width", "shared"), [(6, ["input_proj.weight"]), (8, [])])
def test_query_and_candidates_share_the_projection_of_their_inputs(width, shared):
    selector = LeverPlusSelector(LeverPlusSelectorConfig(embed_dim=width, hidden_dim=8))
    assert [name for name, _ in selector.named_parameters() if "input_proj" in name] == shared
    query, pool = torch.randn(1, width), torch.randn(1, 3, width)
    with torch.no_grad():  # a pool of copies of the query: all alike
        output = selector.eval()(query, query.expand(1, 3, -1), sequences=torch.tensor([[[0]]]))
        assert output.log_probs.exp().item() == pytest.approx(1 / 3)
        other = selector(query, pool, sequences=torch.tensor([[[0]]]))
    assert other.log_probs.exp().item() != pytest.approx(1 / 3, abs=1e-3)


def test_weights_start_as_lever_pluss_do():
    torch.manual_seed(0)
    config = LeverPlusSelectorConfig(embed_dim=64, hidden_dim=64, pick_update="weighted")
    selector = LeverPlusSelector(config)
    for module in (selector.query_proj, selector.candidate_proj):
        noise = module.weight - torch.eye(64)
        assert noise.std().item() == pytest.approx(0.01, rel=0.1)
    assert selector.pick_update.weight.item() == pytest.approx(0.6)


def test_presets_and_a_saved_config(tmp_path):
    first, second = config_from_preset("lever-plus-v1"), config_from_preset("lever-plus-v2", num_layers=3)
    assert (first.version, first.pick_update, first.logit_temperature) == ("v1", "average", 0.1)
    assert (second.version, second.pick_update, second.num_layers) == ("v2", "none", 3)
    second.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is LeverPlusSelectorConfig and loaded.num_layers == 3 and loaded.version == "v2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "v3"}, "version='v3': must be one of v1, v2"),
        ({"pick_update": "gru"}, "pick_update='gru': must be one of none, average, weighted, gated"),
        ({"logit_temperature": 0.0}, "logit_temperature=0.0: must be above 0"),
        ({"num_layers": 0}, "num_layers=0: must be at least 1"),
        ({"hidden_dim": 6, "num_attention_heads": 4}, "hidden_dim=6 is not a multiple of num_attention_heads=4"),
        ({"stop": True}, "stop=True: a LeverPlusSelector has none"),
        ({"similarity_prior": True}, "similarity_prior=True: a LeverPlusSelector has none"),
    ],
)
def test_a_bad_value_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LeverPlusSelectorConfig(**options)


@pytest.mark.parametrize("preset", ["lever-plus-v1", "lever-plus-v2"])
def test_it_is_post_trained_as_the_others_are(preset, planted, tmp_path):
    torch.manual_seed(0)
    features = {"text": planted.embeddings.shape[1]}
    config = config_from_preset(preset, hidden_dim=16, query_features=features, candidate_features=features)
    selector = LeverPlusSelector(config)
    start = weights_of(selector)
    rates = {"learning_rate": 0.05, "rce_learning_rate": 0.05}
    trainer = make_trainer(tmp_path, planted, selector, grpo_epochs=10, **rates)
    trainer.train()
    rewards = [log["eval_greedy_reward"] for log in trainer.state.log_history if "eval_greedy_reward" in log]
    assert max(rewards) > rewards[0] + 0.4
    still = [name for name, value in weights_of(trainer.model).items() if torch.equal(value, start[name])]
    assert [name for name in still if not name.endswith("k_proj.bias")] == []
