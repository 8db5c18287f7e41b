"""The metric for `evaluate.load`: from its folder, without the network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lever_grpo.metrics


evaluate = pytest.importorskip("evaluate")

FOLDER = Path(lever_grpo.metrics.__file__).parent / "modules" / "vqa_accuracy"
PREDICTIONS = ["Two.", "yes", "cat", "the cat"]
REFERENCES = [["2"] * 5 + ["3"] * 5, ["yes"] + ["no"] * 9, ["dog", "cat"], ["cat"]]
ACCURACIES = [1.0, 0.3, 0.5, 1.0]


@pytest.fixture
def metric(tmp_path, monkeypatch):
    for name in ("HF_EVALUATE_CACHE", "HF_METRICS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(evaluate.config, name, tmp_path / name)
    monkeypatch.setattr(sys, "path", [*sys.path])  # evaluate adds the folder of its modules
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield evaluate.load(str(FOLDER), cache_dir=str(tmp_path / "data"))
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def test_compute(metric):
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == {"vqa_accuracy": pytest.approx(0.7)}
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES, per_item=True)
    assert result == {"vqa_accuracy": pytest.approx(0.7), "vqa_accuracies": ACCURACIES}


def test_one_string_for_a_list_of_one(metric):
    one = metric.compute(predictions=["Two", "a cat", "cow"], references=["2", "cat", "dog"], per_item=True)
    assert one["vqa_accuracies"] == [1.0, 1.0, 0.0]
    mixed = metric.compute(predictions=["cat", "cat"], references=[["cat"], "cat"], per_item=True)
    assert mixed["vqa_accuracies"] == [1.0, 1.0]


def test_batches(metric):
    metric.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    metric.add(prediction=PREDICTIONS[2], reference=REFERENCES[2])
    metric.add(prediction=PREDICTIONS[3], reference=REFERENCES[3][0])
    assert metric.compute(per_item=True)["vqa_accuracies"] == ACCURACIES


def test_wrong_input(metric):
    for references in ([[]], [None], [[["cat"]]], [["cat", 1]]):
        with pytest.raises(ValueError, match="must be a string, or a list of strings, at least one"):
            metric.compute(predictions=["cat"], references=references)
    with pytest.raises(ValueError, match="Mismatch in the number of predictions"):
        metric.compute(predictions=["cat"], references=["cat", "dog"])
    with pytest.raises(ValueError, match="there are no predictions"):
        metric.compute(predictions=[], references=[])


def test_the_folder_does_not_hide_the_function():
    assert callable(lever_grpo.metrics.vqa_accuracy)
    assert lever_grpo.metrics.vqa_accuracy("cat", ["cat"]) == 1.0


def test_the_metric_card_runs(tmp_path):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=FOLDER.parents[3], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() in card
