"""recipes/train_visual_prefix.py from files to a projector, on tiny models of the real classes."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_language_models import TOKENIZER, llama
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

from lever_grpo.models import VisualPrefixProjector


RECIPE = str(Path(__file__).resolve().parents[1] / "recipes" / "train_visual_prefix.py")
COLOURS = ["red", "green", "blue", "black"]


@pytest.fixture
def options(tmp_path) -> list[str]:
    llama().save_pretrained(tmp_path / "text")
    TOKENIZER.save_pretrained(tmp_path / "text")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTModel(ViTConfig(image_size=8, patch_size=4, **sizes)).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    for colour in COLOURS:
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    rows = [
        {"id": i, "question": f"colour {i}?", "answers": [COLOURS[i % 4][:3]], "image": f"{COLOURS[i % 4]}.png"}
        for i in range(12)
    ]
    for name, part in (("train", rows), ("heldout", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "heldout")}
    return (
        f"--task_file {files['train']} --heldout_file {files['heldout']} --model {tmp_path / 'text'} "
        f"--image_encoder {tmp_path / 'vit'} --projector_width 8 --output_dir {tmp_path / 'out'} --num_prompts 8 "
        "--num_train_epochs 1 "
        "--per_device_train_batch_size 4 --report_to none --use_cpu true --disable_tqdm true"
    ).split()


def run(options, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_visual_prefix.py", *options])
    runpy.run_path(RECIPE, run_name="__main__")


def test_from_files_to_a_projector(options, tmp_path, monkeypatch):
    run(options, monkeypatch)
    projector = VisualPrefixProjector.from_pretrained(tmp_path / "out")
    assert (projector.config.feature_width, projector.config.text_width) == (16, 32)
    assert projector.config.image_encoder == str(tmp_path / "vit") and projector.feature_mean.abs().sum() > 0
    assert (projector.output.bias != 0).any()  # it learned
    report = json.loads((tmp_path / "out" / "worth_of_images.json").read_text())
    assert set(report) == {"held-out rows", "true", "swapped", "none"} and report["held-out rows"] == 6


def test_rows_without_images(options, tmp_path, monkeypatch):
    (tmp_path / "heldout.jsonl").write_text('{"id": 0, "question": "a?", "answers": ["b"]}\n')
    with pytest.raises(ValueError, match=r"heldout.jsonl: rows need images.*rows \[0\] have none"):
        run(options, monkeypatch)
