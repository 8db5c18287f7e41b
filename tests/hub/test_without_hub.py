"""What needs no Hub: cards of other selectors, and mistakes that are named before anything is sent."""

import json
import re
import shutil

import pytest
from peft import LoraConfig
from planted import make_selector, make_trainer
from small_clip import make_clip, make_processor

from lever_grpo import load_sample
from lever_grpo.data import Example
from lever_grpo.hub import fetch_run, push_folder, push_log, push_report, push_selector, selector_card
from lever_grpo.models import ClipSelector, load_selector


@pytest.fixture
def folder(tmp_path):
    make_selector().save_pretrained(tmp_path / "selector")
    return tmp_path / "selector"


def snippet_of(card) -> str:
    (snippet,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    compile(snippet, "card", "exec")
    return snippet


def test_snippet_of_a_selector_with_encoders(folder):
    """Runs where the encoders are installed; the others are run in `test_hub.py`."""
    encoder = {"text": {"kind": "text", "template": "{question}"}}
    (folder / "encoders.json").write_text(json.dumps(encoder))
    assert "set_candidates([Example(" in snippet_of(selector_card(folder, "me/x"))
    encoder["text"]["kind"] = "image"
    (folder / "encoders.json").write_text(json.dumps(encoder))
    assert "embed(candidates)" in snippet_of(selector_card(folder, "me/x"))  # nobody has these images at hand


@pytest.mark.parametrize("modalities", [["image", "text"], ["image"], ["text"]])
def test_snippet_of_a_selector_that_sees_the_rows_runs(modalities, tmp_path, capsys):
    ClipSelector.from_clip(make_clip(), modalities=modalities, hidden_dim=8).save_pretrained(tmp_path)
    make_processor().save_pretrained(tmp_path)
    exec(snippet_of(selector_card(tmp_path, str(tmp_path))), {})
    shown = eval(capsys.readouterr().out)
    assert len(shown) == len(set(shown)) == 2


def test_encoders_of_the_sample_are_understood(folder):
    shutil.copy(load_sample("supersense").folder / "encoders.json", folder)
    card = selector_card(folder, "me/x")
    assert "embed(candidates)" in snippet_of(card)  # the planted selector's feature is none of these
    size = sum(parameter.numel() for parameter in make_selector().parameters())
    assert f"{size:,} parameters" in card.text


def test_card_without_results_has_no_model_index(folder):
    card = selector_card(folder, "me/x", tags=["vqa"])
    assert "model-index" not in card.data.to_dict() and card.data.tags[-1] == "vqa"
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == [
        "## How to use", "## Versions", "## Limits", "## Citation"
    ]  # fmt: skip


def test_mistakes_are_named(folder, tmp_path, planted_files):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found neither a selector .* nor a report"):
        push_folder(tmp_path / "empty", "me/x")
    with pytest.raises(ValueError, match="expected config.json and the weights"):
        push_selector(tmp_path / "empty", "me/x")
    with pytest.raises(ValueError, match="expected a report, found no report.json"):
        push_report(folder, "me/x")
    with pytest.raises(ValueError, match="repo_type='dataset': .* goes to a model repository"):
        push_folder(folder, "me/x", repo_type="dataset")
    with pytest.raises(ValueError, match="repo_type='model': .* goes to a dataset repository"):
        push_folder(planted_files["train"], "me/x", repo_type="model")
    with pytest.raises(ValueError, match="speaks of .* rows that are not among them"):
        push_log(planted_files["train"], "me/x", rows=[Example(0, "?", ("?",))])
    with pytest.raises(FileExistsError, match="is not empty"):
        fetch_run("me/x", folder)


def test_card_of_an_adapter(planted, tmp_path):
    """It says what the adapter belongs to; arguments of other cards are named, and stop nothing."""
    make_selector().save_pretrained(tmp_path / "start")
    options = {"peft_config": LoraConfig(r=2, target_modules="all-linear"), "max_steps": 1, "eval_strategy": "no"}
    model = load_selector(tmp_path / "start")
    trainer = make_trainer(tmp_path / "out", planted, model, save_strategy="no", **options)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(dataset="a log", model_name="me/adapter")
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'PeftModel.from_pretrained(selector.selector, "me/adapter")' in card and "rce_epochs" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    for name, folder in (("start", tmp_path / "start"), ("me/adapter", tmp_path / "out")):
        snippet = snippet.replace(f'"{name}"', repr(str(folder)))
    scope: dict = {}
    exec(snippet, scope)
    assert scope["selector"].selector.config.model_type == trainer.model.config.model_type


def test_rows_belong_to_logs(folder):
    with pytest.raises(ValueError, match="is no beam log"):
        push_folder(folder, "me/x", rows=[])
