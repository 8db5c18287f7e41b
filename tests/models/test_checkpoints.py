"""What a selector must survive: saving, adapters, half precision, compilation."""

import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_selectors import make_batch, make_selector
from transformers import AutoModel, Trainer, TrainingArguments


def single(batch: dict) -> dict:
    return {name: x.float() if x.is_floating_point() else x for name, x in batch.items()}


@torch.no_grad()
def test_a_saved_selector_comes_back_as_it_was(variant, tmp_path):
    selector, batch = make_selector(variant).float(), single(make_batch())
    selector.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(selector) and not loaded.training
    assert {name: p.dtype for name, p in loaded.named_parameters()} == {
        name: torch.float32 for name, _ in selector.named_parameters()
    }
    for name, value in selector.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    expected, output = (model(**batch, return_step_log_probs=True) for model in (selector, loaded))
    assert torch.equal(output.log_probs, expected.log_probs)
    assert torch.equal(output.step_log_probs, expected.step_log_probs)


def test_weights_that_a_checkpoint_lacks_start_at_the_baseline(tmp_path):
    """A selector without a prior, loaded with one: what is new is initialised, what is there is kept."""
    selector = make_selector("v1").float()
    selector.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, similarity_prior=True)
    fresh = make_selector("v1-prior", trained=False).float()
    assert torch.equal(loaded.prior.mix, fresh.prior.mix) and loaded.prior.mix.unique().numel() == 3
    torch.testing.assert_close(loaded.prior.log_scale.exp(), torch.full((2,), 3.0))
    assert (loaded.prior.redundancy == 0).all() and (loaded.prior.agreement == 0).all()
    assert all((metric.up.weight == 0).all() for metric in loaded.prior.query_metric.values())
    assert all((metric.down.weight != 0).all() for metric in loaded.prior.query_metric.values())
    assert torch.equal(loaded.pointer.state_proj.weight, selector.pointer.state_proj.weight)


def test_initial_weights_have_the_scale_of_their_width():
    selector = make_selector("v3-prior-sets", trained=False, hidden_dim=64)
    for name, module in selector.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith(("pointer", "prior")):
            assert module.weight.std().item() == pytest.approx(module.in_features**-0.5, rel=0.2), name
            assert module.bias is None or (module.bias == 0).all()


@pytest.mark.parametrize("task_type", [None, "FEATURE_EXTRACTION"])
def test_lora_trains_only_its_adapters(variant, task_type, tmp_path):
    selector, batch = make_selector(variant).float(), single(make_batch())
    base = {name: value.clone() for name, value in selector.state_dict().items()}
    before = selector(**batch).log_probs.detach()
    selector.save_pretrained(tmp_path / "base")
    targets = {
        "v0": ["c_attn", "candidate_in"],
        "v0-prior": ["c_attn", "candidate_out", "up"],
        "prior": ["down", "up"],
        "v1": ["state_proj", "from_pick"],
        "v1-prior": ["state_proj", "from_pick", "up"],
        "lever-plus-v1": ["up_proj", "down_proj"],
        "lever-plus-v2": ["q_proj", "v_proj"],
    }
    targets = targets.get(variant, ["q_proj", "v_proj", "state_proj"])
    model = get_peft_model(selector, LoraConfig(r=2, target_modules=targets, task_type=task_type)).train()
    assert torch.allclose(model.eval()(**batch).log_probs, before)  # an adapter starts as no change
    model.train()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).log_probs.sum().backward()
        optimizer.step()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    assert {name.split(".")[-4] for name in trained} == set(targets)
    kept = {name.replace(".base_layer", ""): value for name, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in base.items())

    after = model.eval()(**batch).log_probs.detach()
    assert not torch.allclose(after, before, atol=1e-3)
    picks = model.select(batch["query_embeds"], batch["candidate_embeds"], num_shots=2)
    torch.testing.assert_close(model(**{**batch, "sequences": picks.sequences}).log_probs.sum(-1), picks.scores)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(loaded.eval()(**batch).log_probs, after)
    torch.testing.assert_close(model.merge_and_unload()(**batch).log_probs, after, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_bf16_autocast_gives_float_log_probs_near_the_full_ones(variant):
    selector, batch = make_selector(variant).float(), single(make_batch(queries=8))
    expected = selector(**batch, return_step_log_probs=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = selector(**batch, return_step_log_probs=True)
    assert output.log_probs.dtype == output.step_log_probs.dtype == torch.float32
    assert output.log_probs.isfinite().all()
    close = (output.step_log_probs.exp() - expected.step_log_probs.exp()).abs()
    assert close.max() < 0.1 and close.mean() < 0.01
    torch.testing.assert_close(output.step_log_probs.exp().sum(-1), torch.ones(8, 3, 3))


def test_bf16_autocast_has_finite_gradients(variant):
    selector, batch = make_selector(variant).float(), single(make_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = selector(**batch).log_probs.sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in selector.parameters())


@torch.no_grad()
def test_a_bf16_selector_takes_float_embeddings():
    selector, batch = make_selector("v3-prior-sets").bfloat16(), single(make_batch())
    output = selector(**batch, return_step_log_probs=True)
    assert output.log_probs.dtype == torch.float32 and output.log_probs.isfinite().all()


def compiled_agrees(variant: str, backend: str) -> None:
    torch._dynamo.reset()
    selector, batch = make_selector(variant).float(), single(make_batch())
    compiled = torch.compile(selector, backend=backend, fullgraph=True)
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 4] = False
    batch.update(candidate_mask=mask, sequence_mask=batch["sequences"] != 4)
    values, gradients = [], []
    for model in (selector, compiled):
        selector.zero_grad()
        output = model(**batch, return_step_log_probs=True)
        output.log_probs.sum().backward()
        values.append((output.log_probs.detach(), output.step_log_probs.detach()))
        gradients.append([p.grad.clone() for p in selector.parameters()])
    for eager, other in itertools.chain(zip(*values, strict=True), zip(*gradients, strict=True)):
        torch.testing.assert_close(other, eager, atol=1e-4, rtol=1e-4)


def test_the_forward_pass_is_one_graph_that_compiles(variant):
    compiled_agrees(variant, "aot_eager")


@pytest.mark.slow
def test_the_compiled_forward_pass_equals_the_eager_one(variant):
    compiled_agrees(variant, "inductor")


def test_a_trainer_does_not_pass_loss_arguments_to_forward(tmp_path):
    # `**kwargs` in the signature would make it do so
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert not Trainer(make_selector().float(), arguments).model_accepts_loss_kwargs
