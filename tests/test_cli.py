"""The command itself: options from YAML and flags, processes, exit codes, JSON, completion."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub.errors import HTTPError
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_tensors
from small_language_models import TOKENIZER, llama

import lever_grpo
from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.cli import build_parser, main, train_classes
from lever_grpo.data import load_beams
from lever_grpo.pipeline.launch import CommandArguments, launch, packaged_configs
from lever_grpo.pipeline.parsing import parse_dataclasses
from lever_grpo.search.samplers import METHODS


ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Options:
    size: Literal["small", "large"] = "small"
    order: Literal["left", "right"] | None = None
    level: Literal[0, 1] = 0
    name: str = "x"
    names: list[str] | None = None
    counts: list[int] | None = None
    weights: list[float] | None = None


def parse(tmp_path, config, *flags):
    path = tmp_path / "options.yaml"
    path.write_text(config)
    return parse_dataclasses([Options], [f"--config={path}", *flags])[0]


# ---- options ----


def test_values_of_a_yaml(tmp_path):
    config = "size: large\norder: right\nlevel: 1\nname: 'no'\nnames: ['yes', b]\ncounts: [1, 2]\nweights: [1, 0.5]\n"
    assert parse(tmp_path, config) == Options("large", "right", 1, "no", ["yes", "b"], [1, 2], [1, 0.5])
    assert parse(tmp_path, "order: null\nname: '2'\n") == Options(name="2")
    assert parse(tmp_path, config, "--size", "small", "--counts", "3") == Options(
        "small", "right", 1, "no", ["yes", "b"], [3], [1, 0.5]
    )


@pytest.mark.parametrize(
    "config, message",
    [
        ("size: larg", "size='larg' must be of small, large"),
        ("order: up", "order='up' must be of left, right"),
        ("level: 2", "level=2 must be of 0, 1"),
        ("size: [small]", r"size=\['small'\] is no"),
        ("name: no", "name=False is no str; give one. Quote yes, no, on and off"),
        ("names: [yes, b]", r"names=\[True, 'b'\] is no"),
        ("counts: ['1']", r"counts=\['1'\] is no"),
        ("weights: [1e-3]", r"weights=\['1e-3'\] is no"),  # YAML 1.1 wants 1.0e-3
        ("sise: small", "the key 'sise' is no argument, 'size' is"),
        ("config: x.yaml", "the key 'config' is no argument"),
    ],
)
def test_mistakes_in_a_yaml(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        parse(tmp_path, config)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--size", "larg"], "invalid choice: 'larg'"),
        (["--level", "x"], "invalid choice"),
        (["--counts", "1", "two"], "invalid int value: 'two'"),
        (["--sise", "small"], "'--sise' is none of the options, '--size' is; --help"),
        (["--siz", "small"], "'--siz' is none of the options"),  # no abbreviations
        (["--token=secret"], "^'--token' is none of the options; --help"),
        (["small"], "'small' is none of the options"),
        (["--config"], "--config: expected one argument"),
    ],
)
def test_mistakes_on_the_command_line(flags, message):
    with pytest.raises(ValueError, match=message):
        parse_dataclasses([Options], flags)


@pytest.mark.parametrize(
    "command, key, value",
    [
        ("train", "loss_type", "gpro"),
        ("train", "lr_scheduler_type", "cosinus"),  # an Enum of transformers
        ("train", "model_preset", "v33"),
        ("generate", "judge", "some"),
        ("generate", "sampler", "text"),
        ("evaluate", "baselines", ["random", "similar"]),
        ("evaluate", "construct_order", "top"),
        ("demo", "scorer", "gpt"),
    ],
)
def test_choices_are_checked_wherever_they_come_from(command, key, value, tmp_path, capsys):
    path = tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump({key: value}))
    assert main([command, "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith(f"lever-grpo: error: {path}: {key}=") and "must be of" in error
    assert main([command, f"--{key}", *([value] if isinstance(value, str) else value)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "invalid choice" in error


def test_help_has_everything(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--config FILE", "--accelerate_config", "--num_processes", "--json", "--loss_type", "--output_dir"):
        assert flag in text


def commands_of_the_parser():
    return next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices


def test_both_spellings_of_a_flag():
    commands = commands_of_the_parser()
    for name in ("inspect", "push"):
        for action in commands[name]._actions:
            dashed = {flag for flag in action.option_strings if "-" in flag[2:]}
            assert {"--" + flag[2:].replace("-", "_") for flag in dashed} <= set(action.option_strings)


# ---- processes ----


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """A folder where `python -m lever_grpo.cli` is a program that notes how it was started, and ends as it is told."""
    package = tmp_path / "lever_grpo"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(
        "import json, os, sys\n"
        "names = ('RANK', 'WORLD_SIZE', 'ACCELERATE_USE_CPU', 'FSDP_VERSION')\n"
        "seen = {name: os.environ.get(name) for name in names}\n"
        "open(f'seen{os.getpid()}.json', 'w').write(json.dumps(seen | {'arguments': sys.argv[1:]}))\n"
        "code = int(sys.argv[-3])\n"
        "sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)\n"
    )
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def start(config, code, num_processes=None):
        arguments = ["--config=a b.yaml", "--seed", str(code)]
        assert launch("train", arguments, CommandArguments(config, num_processes)) == (
            code if code >= 0 else 128 - code
        )
        return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("seen*.json"))]

    yield start
    for number, handler in handlers.items():  # torch leaves its own
        signal.signal(number, handler)


def test_several_processes(workers):
    seen = workers("multi_gpu", 0, num_processes=3)
    assert {process["RANK"] for process in seen} == {"0", "1", "2"} and {p["WORLD_SIZE"] for p in seen} == {"3"}
    # the launched processes do not launch again
    told = ["train", "--config=a b.yaml", "--seed", "0", "--accelerate_config", "none"]
    assert all(process["arguments"] == told for process in seen)
    recipe = parse_dataclasses([CommandArguments], ["--accelerate_config", "multi_gpu", *told[-2:]])[0]
    assert not recipe.launches


def test_one_process_and_its_exit_code(workers):
    assert workers("cpu", 3) == [
        {
            "RANK": None,
            "WORLD_SIZE": None,
            "ACCELERATE_USE_CPU": "True",
            "FSDP_VERSION": None,
            "arguments": ["train", "--config=a b.yaml", "--seed", "3", "--accelerate_config", "none"],
        }
    ]


@pytest.mark.parametrize("config, code", [("multi_gpu", 2), ("multi_gpu", -9), ("single_gpu", -9)])
def test_exit_codes_of_processes(workers, config, code):
    workers(config, code)


def test_a_config_of_ones_own(workers, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(packaged_configs()["fsdp2"].read_text())
    assert [process["FSDP_VERSION"] for process in workers(str(path), 0)] == ["2", "2"]


def test_packaged_configs_are_those_of_the_folder():
    assert packaged_configs() == {path.stem: path for path in (ROOT / "accelerate_configs").glob("*.yaml")}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--accelerate_config", "multi"], "accelerate_config='multi' is no file, and none of cpu, deepspeed_zero2"),
        (["--accelerate_config", "cpu", "--num_processes", "2"], "'cpu', which starts one process"),
        (["--num_processes", "2"], "num_processes=2 is of an accelerate config; name one"),
        (["--accelerate_config", "cpu", "--num_processes", "0"], "num_processes=0 must be at least 1"),
        (
            ["--accelerate_config", str(ROOT / "recipes" / "okvqa_v3.yaml")],
            "okvqa_v3.yaml' is no config of accelerate",
        ),
        (["--accelerate_config", str(ROOT / "README.md")], "README.md: expected"),
        # what can be known before there are processes
        (["--accelerate_config", "multi_gpu", "--beam_dat", "x"], "'--beam_dat' is none of the options"),
    ],
)
def test_processes_that_cannot_be(flags, message, capsys):
    assert main(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error


@pytest.mark.slow
def test_two_processes_really_train(tmp_path):
    """A config of the run that names the processes; both are of one world."""
    config = tmp_path / "run.yaml"
    config.write_text("task: country_facts\nhidden_dim: 8\nagreement_steps: 0\naccelerate_config: multi_gpu\n")
    command = [sys.executable, "-m", "lever_grpo.cli", "train", f"--config={config}", "--use_cpu", "--dry_run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "INFO"}
    done = subprocess.run(
        [*command, "--report_to", "none", "--json"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"output_dir": "trainer_output", "report": None}
    assert done.stderr.count("dry run: all is well") == 2 and "[rank1]" in done.stderr


# ---- exit codes ----


def test_mistakes_are_one_line_or_a_traceback(tmp_path, capsys, monkeypatch):
    path = tmp_path / "typo.yaml"
    path.write_text("beam_dat: x\n")
    assert main(["train", "--config", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "'beam_dat' is no argument" in captured.err
    monkeypatch.setenv("LEVER_GRPO_DEBUG", "1")
    with pytest.raises(ValueError, match="beam_dat"):
        main(["train", "--config", str(path)])


def test_what_is_missing_is_one_line(tmp_path, capsys, monkeypatch):
    """A Hub that is not there, a package that is not installed."""
    PointerSelector(PointerSelectorConfig(embed_dim=4, hidden_dim=8)).save_pretrained(tmp_path)

    class ConnectError(HTTPError):
        """As the client has it; no `OSError`."""

    def unreachable(*args, **kwargs):
        raise ConnectError("Connection refused")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", unreachable)
    capsys.readouterr()
    assert main(["push", str(tmp_path), "me/x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "ConnectError: Connection refused" in error

    def absent(*args, **kwargs):
        raise ImportError("pip install it")

    monkeypatch.setattr(lever_grpo.DemonstrationSelector, "from_pretrained", absent)
    assert main(["select", "x", "--queries", "q", "--candidates", "c", "--out", "o"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install it" in error


@pytest.mark.parametrize("arguments", [[], ["inspct"], ["inspect"], ["inspect", "--strikt", "log.json"]])
def test_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == "" and "usage: lever-grpo" in captured.err


def test_ctrl_c(tmp_path, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(lever_grpo.data, "load_beams", interrupted)
    assert main(["inspect", "log.json"]) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "lever-grpo: interrupted\n")


def test_version(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0 and capsys.readouterr().out == f"lever-grpo {lever_grpo.__version__}\n"


# ---- for programs ----


def read_json(capsys):
    return json.loads(capsys.readouterr().out)


def test_env(capsys):
    assert main(["env", "--json"]) == 0
    found = read_json(capsys)
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["Python"] == ".".join(map(str, sys.version_info[:3])) and found["Accelerator"]
    assert main(["env"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"- {name}: {value}" for name, value in found.items()]


def test_from_rows_to_answers(tmp_path, capsys):
    """generate, select and evaluate with a tiny model; the standard output is JSON and nothing else."""
    llama().save_pretrained(tmp_path / "llama")
    TOKENIZER.save_pretrained(tmp_path / "llama")
    rows = [{"id": i, "question": f"colour {i}?", "answers": [("red", "blue")[i % 2]]} for i in range(10)]
    task = tmp_path / "rows.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    embeddings = {"question": np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)}
    save_file(embeddings, tmp_path / "embeddings.safetensors")
    widths = {"query_features": {"question": 4}, "candidate_features": {"question": 4}}
    PointerSelector(PointerSelectorConfig(**widths, encoder="none", similarity_prior=True)).save_pretrained(
        tmp_path / "selector"
    )

    shared = ["--task_file", str(task), "--model", str(tmp_path / "llama"), "--device", "cpu", "--disable_tqdm"]
    folder = tmp_path / "beams"
    command = ["generate", *shared, "--sampler", "random", "--pool_size", "4", "--num_queries", "3", "--json"]
    assert main([*command, "--output_dir", str(folder)]) == 0
    found = read_json(capsys)
    assert found["log"] == str(folder / "beams.jsonl") and found["queries"] == 3
    log = load_beams(found["log"])
    assert found["records"] == len(log) == 3 and found["sequences"] == sum(map(len, log["sequences"]))
    assert main([*command, "--output_dir", str(tmp_path / "other"), "--max_hours", "0", "--batch_queries", "1"]) == 3
    found = read_json(capsys)
    assert found["log"] is None and "1 of 3 shards" in found["stopped"]

    picks, embedded = tmp_path / "picks.jsonl", str(tmp_path / "embeddings.safetensors")
    command = ["select", str(tmp_path / "selector"), "--queries", str(task), "--candidates", str(task), "--json"]
    command += ["--query_embeddings", embedded, "--candidate_embeddings", embedded, "--sampler", "random"]
    assert main([*command, "--out", str(picks), "--pool_size", "4"]) == 0
    assert read_json(capsys) == {"selections": str(picks), "queries": 10}
    assert len(picks.read_text().splitlines()) == 10

    command = ["evaluate", *shared, "--embeddings", embedded, "--log", str(folder / "beams.jsonl"), "--json"]
    command += ["--selectors", f"grpo={tmp_path / 'selector'}", "--baselines", "zero_shot", "similarity"]
    assert main([*command, "--num_shots", "1", "--output_dir", str(tmp_path / "answers")]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["queries"] == 3 and Path(found["page"]).name == "report.html" and Path(found["page"]).exists()
    assert json.loads(Path(found["report"]).read_text())["settings"]["queries"] == 3
    assert "zero" in captured.err  # the tables are not lost


def test_train(planted_files, tmp_path, capsys):
    command = ["train", "--beam_data", planted_files["train"], "--validation_data", planted_files["validation"]]
    command += ["--heldout_data", planted_files["heldout"], "--embeddings", planted_files["embeddings"]]
    command += ["--hidden_dim", "8", "--sft_epochs", "1", "--rce_epochs", "1", "--grpo_epochs", "0"]
    command += ["--model_preset", "v1", "--use_cpu", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert main([*command, "--json"]) == 0
    found = read_json(capsys)
    assert found == {"output_dir": str(tmp_path / "out"), "report": str(tmp_path / "out" / "report.json")}
    assert json.loads(Path(found["report"]).read_text())["methods"]["rce"]
    assert not torch.distributed.is_initialized()  # a process that ends within a group may abort
    assert main([*command, "--resume_from_checkpoint", "checkpoint-3"]) == 2
    assert "must be true or false" in capsys.readouterr().err


def test_samplers_of_select(capsys):
    select = commands_of_the_parser()["select"]
    (sampler,) = [action for action in select._actions if action.dest == "sampler"]
    assert sampler.choices == (*METHODS, "mix")
    with pytest.raises(SystemExit):
        main(["select", "x", "--queries", "q", "--candidates", "c", "--out", "o", "--sampler", "text"])
    assert "invalid choice: 'text'" in capsys.readouterr().err


def test_every_command_has_json_as_the_page_says():
    """The table and the sentences of `cli.md`."""
    without = {"demo", "completion"}
    for name, parser in commands_of_the_parser().items():
        classes = parser.get_default("classes")
        flags = {flag for action in parser._actions for flag in action.option_strings}
        has = CommandArguments in classes() if classes is not None else "--json" in flags
        assert has == (name not in without), name
        assert (classes is not None) == (name in ("train", "generate", "evaluate", "demo"))  # --config


def test_convert(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "convert")
    from public_lever_plus import public_selector

    selector = public_selector("v2-layers")
    save_tensors(selector.state_dict(), tmp_path / "a.safetensors")
    assert main(["convert", str(tmp_path / "a.safetensors"), "--output_dir", str(tmp_path / "new"), "--json"]) == 0
    found = read_json(capsys)
    assert found["selector"] == str(tmp_path / "new") and found["family"] == "Lever-Plus v2"
    assert found["num_weights"] == sum(p.numel() for p in selector.parameters())


# ---- completion ----


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """What bash offers for the last of the words, asked as bash does."""
    pytest.importorskip("shtab")
    if shutil.which("bash") is None:
        pytest.skip("there is no bash")
    folder = tmp_path_factory.mktemp("completion")
    script = folder / "completion.bash"
    with script.open("w") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(["completion", "bash"]) == 0
    (folder / "mine.yaml").touch()

    def ask(*words):
        code = """
            source completion.bash
            COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
            registered=($(complete -p lever-grpo))
            "${registered[-2]}"  # complete … -F function lever-grpo
            printf "%s\\n" "${COMPREPLY[@]}"
        """
        done = subprocess.run(
            ["bash", "-c", code, "bash", "lever-grpo", *words], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        return done.stdout.split()

    return ask


def test_completion_of_commands(complete):
    assert set(complete("")) == set(commands_of_the_parser())
    assert complete("ins") == ["inspect"]


def test_completion_of_options(complete):
    everything = {f"--{f.name}" for cls in train_classes() for f in fields(cls) if f.init}
    assert everything | {"--config"} <= set(complete("train", "--"))
    assert complete("generate", "--jud") == ["--judge", "--judge_by"]
    assert complete("inspect", "log.json", "--st") == ["--strict"]
    assert complete("convert", "--logit") == ["--logit_temperature"]
    assert complete("completion", "") == ["bash", "zsh", "tcsh"]


def test_completion_of_values(complete):
    assert complete("generate", "--judge", "") == ["none", "survivors", "all"]
    assert complete("evaluate", "--baselines", "random", "m") == ["mix", "mmr"]
    assert complete("train", "--kl_direction", "f") == ["forward"]
    assert complete("train", "--lr_scheduler_type", "cosine_with_r") == ["cosine_with_restarts"]
    assert complete("train", "--config", "mi") == ["mine.yaml"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert "--accelerate_config" in text or "accelerate_config" in text
    assert "survivors" in text


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert "pip install 'lever_grpo[completion]'" in capsys.readouterr().err
