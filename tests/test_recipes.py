"""The scripts of recipes/ and their YAML files."""

import logging
import os
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from lever_grpo import (
    DataCollatorForBeams,
    EmbeddingStore,
    GroupBeamGRPOConfig,
    SelectorSFTConfig,
    load_sample,
)
from lever_grpo.pipeline import RecipeArguments, parse
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
    runpy.run_path(path, run_name="__main__")


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


def test_the_ablations_versions_can_be_built():
    ablate = runpy.run_path(str(RECIPES / "ablate.py"))
    sample = load_sample("country_facts")
    store = EmbeddingStore.open(sample.folder / "embeddings.safetensors")
    collator = DataCollatorForBeams(store, sample.query_features, sample.candidate_features)
    for about in ablate["VERSIONS"].values():
        recipe = RecipeArguments(model_preset=about["preset"], model_init_kwargs=about.get("options"), hidden_dim=8)
        recipe.num_set_layers = about.get("num_set_layers", 0)
        config = build_selector(recipe, collator).config
        assert all(getattr(config, name) == value for name, value in about.get("options", {}).items())
    keys = [ablate["key"]("grpo", version) for version in ablate["VERSIONS"]]
    assert len(set(keys)) == len(keys) and all(key.isidentifier() for key in keys)
    assert ablate["REFERENCE"] in ablate["VERSIONS"]
