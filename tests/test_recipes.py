"""The scripts of recipes/ and their YAML files."""

import logging
import os
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoProcessor

from lever_grpo import (
    DataCollatorForBeams,
    EmbeddingStore,
    GroupBeamGRPOConfig,
    SelectorSFTConfig,
    load_sample,
)
from lever_grpo.data import DataCollatorForRawBeams, load_examples
from lever_grpo.models import PRESETS
from lever_grpo.pipeline import parse
from lever_grpo.pipeline.stages import build_selector


RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CONFIGS = {"okvqa_v3": GroupBeamGRPOConfig, "sft_v2": SelectorSFTConfig}


def test_every_yaml_has_its_recipe():
    # no trainer's: tests of generate and evaluate
    others = {"generate_beams", "evaluate_icl", "evaluate_supersense", "evaluate_easy_vqa"}
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(CONFIGS) | others
    assert all((RECIPES / f"{name}.py").exists() for name in CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spelling", ["two", "one"])
def test_yaml_parses(name, spelling):
    path = str(RECIPES / f"{name}.yaml")
    recipe, args = parse(["--config", path] if spelling == "two" else [f"--config={path}"], CONFIGS[name])
    assert type(args) is CONFIGS[name]
    values = yaml.safe_load(Path(path).read_text())
    for key, value in values.items():
        found = getattr(recipe, key) if hasattr(recipe, key) else getattr(args, key)
        assert found == value or key == "report_to" and found == []


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_keys_are_errors(name, tmp_path, capsys):
    path = tmp_path / "typo.yaml"
    path.write_text((RECIPES / f"{name}.yaml").read_text() + "\nlerning_rate: 1.0e-3\n")
    with pytest.raises(ValueError, match="lerning_rate"):
        parse(["--config", str(path)], CONFIGS[name])
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse(["--output_dir", str(tmp_path), "--lerning_rate", "1e-3"], CONFIGS[name])
    assert "lerning_rate" in str(caught.value) + capsys.readouterr().err


@pytest.mark.parametrize("name", CONFIGS)
def test_command_line_wins(name):
    config = ["--config", str(RECIPES / f"{name}.yaml")]
    recipe, args = parse([*config, "--hidden_dim", "8", "--learning_rate", "0.5", "--dry_run"], CONFIGS[name])
    assert (recipe.hidden_dim, args.learning_rate, recipe.dry_run) == (8, 0.5, True)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], None),
        (["--resume_from_checkpoint"], "true"),
        (["--resume_from_checkpoint", "--seed", "1"], "true"),
        (["--resume_from_checkpoint", "True"], "true"),
        (["--resume_from_checkpoint", "false"], None),
    ],
)
def test_resuming_is_a_switch(tmp_path, flags, expected):
    _, args = parse(["--output_dir", str(tmp_path), "--use_cpu", *flags], GroupBeamGRPOConfig)
    assert args.resume_from_checkpoint == expected


def test_resuming_from_a_named_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be true or false"):
        parse(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "checkpoint-3"], GroupBeamGRPOConfig)


def test_typos_in_choices_of_a_yaml_are_errors(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("loss_type: gpro\noutput_dir: x\n")
    with pytest.raises(ValueError, match="loss_type='gpro'"):
        parse(["--config", str(path)], GroupBeamGRPOConfig)


def run_script(path: str, arguments: list[str], folder: str, errors: str) -> None:
    """What `python path arguments` does, in this process."""
    sys.stderr = open(errors, "w", buffering=1)
    logging.basicConfig(stream=sys.stderr, force=True)
    os.chdir(folder)
    sys.argv = [path, *arguments]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    runpy.run_path(path, run_name="__main__")
    assert not torch.distributed.is_initialized(), "a process that ends within a group may abort"


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps_of_each_stage(name, planted_files, tmp_path, processes):
    arguments = [f"--config={RECIPES / name}.yaml", "--dry_run", "--use_cpu", "--hidden_dim", "8"]
    arguments += ["--beam_data", planted_files["train"], "--embeddings", planted_files["embeddings"]]
    arguments += ["--validation_data", planted_files["validation"], "--answer_feature", "text"]
    folder, errors = tmp_path / "here", tmp_path / "errors.txt"
    folder.mkdir()
    child = processes.Process(
        target=run_script, args=(str(RECIPES / f"{name}.py"), arguments, str(folder), str(errors))
    )  # fmt: skip
    child.start()
    child.join(120)
    assert child.exitcode == 0, errors.read_text()[-3000:]
    assert "dry run: all is well" in errors.read_text()
    assert ("(2, 2, 2)" in errors.read_text()) == (name == "okvqa_v3")
    assert not list(folder.iterdir())


def test_the_ablations_versions_can_be_built(tmp_path):
    ablate = runpy.run_path(str(RECIPES / "ablate.py"))
    sample = load_sample("country_facts")
    store = EmbeddingStore.open(sample.folder / "embeddings.safetensors")
    collator = DataCollatorForBeams(store, sample.query_features, sample.candidate_features)
    ablate["make_clip"](tmp_path / "clip")
    for version, about in ablate["VERSIONS"].items():
        recipe, _ = ablate["arguments_of"](version, 2, 0, 8, tmp_path)
        seen = collator
        if about["preset"] == "v2_lora":
            rows, processor = load_examples(recipe.task_file)[:4], AutoProcessor.from_pretrained(recipe.clip_model)
            seen = DataCollatorForRawBeams(rows, processor, ["text"])
            batch = seen([{"query_id": 0, "candidate_ids": [1, 2, 3], "sequences": [[0]], "scores": [0.0]}])
            texts = processor.tokenizer.batch_decode(batch["items"]["input_ids"], skip_special_tokens=True)
            assert texts == [rows[0].question, *(f"{row.question} {row.answers[0]}" for row in rows[1:])]
        config = build_selector(recipe, seen).config
        assert all(getattr(config, name) == value for name, value in about.get("options", {}).items())
        assert config.stop == (recipe.min_shots == 1) and (config.max_shots == 2 or not config.stop)
    assert {about["preset"] for about in ablate["VERSIONS"].values()} == set(PRESETS)
    keys = [ablate["key"]("grpo", version) for version in ablate["VERSIONS"]]
    assert len(set(keys)) == len(keys) and all(key.isidentifier() for key in keys)
    assert ablate["REFERENCE"] in ablate["VERSIONS"]


def test_the_ablations_verdict_is_that_of_the_intervals():
    verdict = runpy.run_path(str(RECIPES / "ablate.py"))["verdict"]
    rng = np.random.default_rng(0)
    v2 = rng.normal(size=(3, 200))
    versions = {name: v2 + gain + rng.normal(size=v2.shape) for name, gain in (("a", 0.0), ("b", 1.0), ("c, d", -1.0))}
    assert verdict({"v2": v2, "a": versions["a"]}, "v2").startswith(
        "* No version is above `v2` with certainty. No version is below `v2` with certainty. (1 intervals"
    )
    said = verdict({**versions, "v2": v2}, "v2")
    above, below = r"Above `v2` with certainty: b \(\+[^()]*\)\.", r"Below `v2` with certainty: c, d \(-[^()]*\)\."
    assert re.fullmatch(rf"\* {above} {below} \(3 intervals.*", said)
