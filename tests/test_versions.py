"""Every version of the selector goes the whole way through the recipe: SFT, RCE, GRPO, report, reload."""

import json
import math

import pytest
import torch
from planted import ROWS, make_args
from small_clip import make_clip, make_processor
from test_pipeline import make_recipe
from transformers import AutoModel

from lever_grpo.cli import main
from lever_grpo.inference import choose
from lever_grpo.inference.choices import FORWARD_INPUTS, policy_inputs
from lever_grpo.models import PRESETS, load_selector
from lever_grpo.pipeline import load_task, run, stages
from lever_grpo.report import load_results


VERSIONS = {
    "prior": {"model_preset": "prior", "similarity_prior": True},
    "v0": {"model_preset": "v0", "similarity_prior": True},
    "v1": {"model_preset": "v1", "similarity_prior": True},
    "v2": {"model_preset": "v2", "similarity_prior": False},
    "v3": {"model_preset": "v3", "similarity_prior": True, "num_set_layers": 1},
    "v2_lora": {"model_preset": "v2_lora", "similarity_prior": False},
    "lever-plus-v1": {"model_preset": "lever-plus-v1", "similarity_prior": False},
    "lever-plus-v2": {"model_preset": "lever-plus-v2", "similarity_prior": False},
    "decoder": {
        "model_preset": "v2",
        "model_init_kwargs": {"state_update": "gru", "scoring": "additive", "decoder_terms": ["mmr", "dpp"]},
    },
    "stop": {"model_preset": "v2", "model_init_kwargs": '{"stop": true, "max_shots": 2}', "min_shots": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP on disk, and rows for it."""
    folder = tmp_path_factory.mktemp("clip")
    make_clip().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    rows = [{"id": i, "question": f"what is {i}?", "answers": [f"thing {i % 7}"]} for i in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"clip_model": str(folder), "task_file": str(folder / "rows.jsonl")}


def test_every_preset_is_tried():
    assert {options["model_preset"] for options in VERSIONS.values()} == set(PRESETS)


@torch.no_grad()
def log_probs_of(selector, data):
    """Of all held-out sequences, without dropout."""
    training = selector.training
    inputs = policy_inputs(data.policy_collator(list(data.heldout)), FORWARD_INPUTS, selector)
    log_probs = selector.eval()(**inputs).log_probs
    selector.train(training)
    return log_probs


@pytest.fixture
def when_saved(monkeypatch):
    """Data and log-probabilities of the selectors of a run, by stage, taken when they were saved."""
    found, save_selector = {}, stages.save_selector

    def look_and_save(selector, folder, data):
        found[folder.name] = data, log_probs_of(selector, data)
        save_selector(selector, folder, data)

    monkeypatch.setattr(stages, "save_selector", look_and_save)
    return found


def check_reloaded(output, kind, when_saved):
    assert {"sft", "rce", "grpo"} == when_saved.keys()
    for name, (data, expected) in when_saved.items():
        selector = AutoModel.from_pretrained(output / name)
        assert type(selector) is kind
        assert torch.equal(log_probs_of(selector, data), expected) and len(expected.unique()) > 10


@pytest.mark.parametrize("version", list(VERSIONS))
def test_a_version_goes_the_whole_way(version, planted_files, clip, when_saved, tmp_path):
    options = VERSIONS[version] | (clip if version == "v2_lora" else {})
    recipe, output = make_recipe(planted_files, **options), tmp_path / "out"
    report = run(recipe, make_args(output, learning_rate=0.02))
    assert {"random", "similarity", "sft", "rce", "grpo", "oracle"} <= report["methods"].keys()
    data, results = load_task(recipe), load_results(output / "results.json")
    check_reloaded(output, PRESETS[options["model_preset"]], when_saved)
    for name in ("sft", "rce", "grpo"):
        selector = load_selector(output / name)
        picks = choose(selector, data.heldout, data.policy_collator)
        assert results[name].picks.tolist() == [picks.tolist()]
    log = json.loads((output / "checkpoints" / "grpo" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["policy_loss"] for entry in log if "policy_loss" in entry]
    assert len(losses) > 3 and all(math.isfinite(loss) for loss in losses)
    assert max(entry.get("kl", 0.0) for entry in log) > 0  # the policy moved


@pytest.mark.slow
@pytest.mark.parametrize("version", list(VERSIONS))
def test_the_train_command_trains_a_version_on_the_sample(version, clip, when_saved, tmp_path):
    options = {"task": "country_facts", "max_samples": 16, "sft_epochs": 1, "rce_epochs": 1, "grpo_epochs": 2}
    options |= {"hidden_dim": 16, "use_cpu": True, "report_to": "none", "output_dir": tmp_path, **VERSIONS[version]}
    if version == "v2_lora":
        options["clip_model"] = clip["clip_model"]  # the rows are the sample's
    words = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in options.items()}
    assert main(["train", *(word for name, value in words.items() for word in (f"--{name}", value))]) == 0
    assert {"sft", "rce", "grpo"} <= json.loads((tmp_path / "report.json").read_text())["methods"].keys()
    check_reloaded(tmp_path, PRESETS[options["model_preset"]], when_saved)


def test_the_processor_goes_with_an_end_to_end_selector(planted_files, clip, tmp_path):
    from transformers import AutoProcessor

    run(make_recipe(planted_files, **VERSIONS["v2_lora"], **clip), make_args(tmp_path / "out"))
    texts = ["what is 1? thing 1"]
    saved, original = (AutoProcessor.from_pretrained(path) for path in (tmp_path / "out" / "grpo", clip["clip_model"]))
    assert saved.tokenizer(texts)["input_ids"] == original.tokenizer(texts)["input_ids"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model_preset": "v0", "model_init_kwargs": {"scoring": "additive"}}, "GPT2SelectorConfig, has no option"),
        ({"model_preset": "v2_lora"}, "name one by clip_model"),
        ({"min_shots": 3}, "min_shots=3 must lie in 1…num_shots, which is 2"),
    ],
)
def test_mistakes_are_named(options, message, planted_files, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(make_recipe(planted_files, **options), make_args(tmp_path / "out"))


@pytest.mark.parametrize("given, message", [("{stop}", "is no JSON"), ("[1]", "expected options and values")])
def test_model_init_kwargs_are_json(given, message, planted_files):
    with pytest.raises(ValueError, match=message):
        make_recipe(planted_files, model_init_kwargs=given)


def test_an_end_to_end_selector_needs_its_own_options(planted_files, clip, tmp_path):
    options = {**VERSIONS["v2_lora"], **clip, "similarity_prior": True, "agreement_steps": 3}
    recipe = make_recipe(planted_files, **options, answer_feature="text")
    with pytest.raises(ValueError, match="sees the rows themselves; set agreement_steps to 0"):
        run(recipe, make_args(tmp_path / "a"))
    without_rows = make_recipe(planted_files, **VERSIONS["v2_lora"], clip_model=clip["clip_model"])
    with pytest.raises(ValueError, match="name them by task_file"):
        run(without_rows, make_args(tmp_path / "b"))


def test_the_train_command_is_the_recipe(planted_files, tmp_path, capsys):
    arguments = ["--beam_data", planted_files["train"], "--validation_data", planted_files["validation"]]
    arguments += ["--heldout_data", planted_files["heldout"], "--embeddings", planted_files["embeddings"]]
    arguments += ["--hidden_dim", "8", "--sft_epochs", "1", "--rce_epochs", "0", "--grpo_epochs", "1"]
    arguments += ["--model_preset", "v1", "--use_cpu", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    assert main(["train", *arguments]) == 0
    assert (tmp_path / "out" / "report.json").exists() and (tmp_path / "out" / "grpo").is_dir()
    assert main(["train", "--beam_data", "nowhere.jsonl"]) == 2
    assert "lever-grpo: error:" in capsys.readouterr().err
