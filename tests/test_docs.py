"""The documentation: its code runs, its commands are known, its tables tell the truth, the site builds.

A block that is neither run nor read by a parser stands under `<!-- not run: reason -->`. The README's Python blocks
and relative links are checked in `test_packaging.py`.
"""

import argparse
import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from PIL import Image
from torch.distributed.run import get_args_parser

from lever_grpo import EmbeddingStore, GroupBeamGRPOConfig, SelectorSFTConfig, SelectorSFTTrainer
from lever_grpo.cli import build_parser
from lever_grpo.demo import parse_demo
from lever_grpo.objectives.policy_losses import LOSS_TYPES
from lever_grpo.pipeline import parse
from lever_grpo.pipeline.evaluate import parse_evaluate
from lever_grpo.pipeline.generate import parse_generate
from lever_grpo.pipeline.launch import NO_LAUNCH, packaged_configs


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ROOT_PAGES = sorted(ROOT.glob("*.md"))
WITH_COMMANDS = [*PAGES, *ROOT_PAGES, ROOT / "recipes" / "README.md"]
BLOCK = re.compile(
    r"^(?:[ \t]*<!-- not run: (?P<reason>[^\n]+?) -->\n)?[ \t]*```(?P<language>\w+)\n(?P<code>.*?)^[ \t]*```$",
    re.MULTILINE | re.DOTALL,
)
Parser = Callable[[list[str]], object]


def blocks(page: Path, language: str) -> Iterator[str]:
    """The blocks of a language that are not marked as not run."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["language"] == language and not found["reason"]:
            yield dedent(found["code"])


# ---- Python ----


def lever_plus_checkpoint() -> None:
    """The checkpoints that convert.md speaks of."""
    from convert.public_lever_plus import PUBLIC, PublicSelector

    options: Any = PUBLIC["v2"]
    for name in ("last", "trusted"):
        torch.save({"state_dict": PublicSelector(**options).state_dict()}, f"{name}.ckpt")


def small_okvqa() -> None:
    """Forty training questions and five others in the layout and under the names of OK-VQA, and embeddings of all."""
    root = Path("okvqa")
    for split, ids in (("train2014", range(40)), ("val2014", range(40, 45))):
        (root / split).mkdir(parents=True)
        for image in ids:
            Image.new("RGB", (4, 4)).save(root / split / f"COCO_{split}_{image:012d}.jpg")
        asked = [{"question_id": 10 * i, "image_id": i, "question": f"What is {i}?"} for i in ids]
        answers = [{"answer": "a dog"}] * 6 + [{"answer": "a cat"}] * 4
        annotated = [{"question_id": 10 * i, "image_id": i, "answers": answers} for i in ids]
        questions = {"data_subtype": split, "questions": asked}
        (root / f"OpenEnded_mscoco_{split}_questions.json").write_text(json.dumps(questions))
        (root / f"mscoco_{split}_annotations.json").write_text(json.dumps({"annotations": annotated}))
    (root / "embeddings").mkdir()
    for name in ("question", "answer", "image"):
        vectors = np.random.default_rng(0).standard_normal((45, 4)).astype(np.float32)
        np.save(root / "embeddings" / f"{name}.npy", vectors)


def lever_plus_embeddings() -> None:
    """What Lever-Plus exports: one tensor, a row for each row of the training split."""
    torch.save(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).half(), "query_embeddings.pt")


# what a page takes for granted
FILES = {"convert": lever_plus_checkpoint, "okvqa": small_okvqa, "MIGRATION": lever_plus_embeddings}
IN_PACKAGING = {ROOT / "README.md"}
WITH_PYTHON = {page.stem: page for page in [*PAGES, *ROOT_PAGES] if any(blocks(page, "python"))}


@pytest.mark.parametrize("name", [name for name, page in WITH_PYTHON.items() if page not in IN_PACKAGING])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    """In the order of the page, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests")
    FILES.get(name, lambda: None)()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code in blocks(WITH_PYTHON[name], "python"):
        exec(compile(code, str(WITH_PYTHON[name]), "exec"), namespace)
    if name == "MIGRATION":
        exported = torch.load("query_embeddings.pt", weights_only=True)
        assert np.array_equal(EmbeddingStore.open("embeddings")["embedding"], exported.numpy())
    if name == "okvqa":
        pools = [json.loads(line) for line in Path("okvqa/pools.jsonl").read_text().splitlines()]
        assert [pool["query_id"] for pool in pools] == [40, 41, 42, 43, 44]
        assert all(len(pool["candidate_ids"]) == 32 and max(pool["candidate_ids"]) < 40 for pool in pools)
    if name == "quickstart":
        (query, shown) = namespace["query"], namespace["picked"].demonstrations
        assert len({row.entity for row in (query, *shown)}) == 3, "rows about the query's own country are not shown"


def test_the_readme_has_the_blocks_that_are_tested():
    assert len(list(blocks(ROOT / "README.md", "python"))) == 2  # by name in test_packaging.py


# ---- commands ----


def train(arguments: list[str]) -> object:
    return parse(arguments, GroupBeamGRPOConfig)


SUBCOMMANDS: dict[str, Parser] = {
    "generate": parse_generate,
    "evaluate": parse_evaluate,
    "demo": parse_demo,
    "train": train,
}
SCRIPTS: dict[str, Parser] = {
    "okvqa_v3.py": train,
    "sft_v2.py": lambda arguments: parse(arguments, SelectorSFTConfig),
    "generate_beams.py": parse_generate,
    "evaluate_icl.py": parse_evaluate,
}


def commands(block: str) -> Iterator[list[str]]:
    """Commands as lists of words, without the `…` that stands for what was said before, and without redirections."""
    for line in block.replace("\\\n", " ").splitlines():
        words = [word for word in shlex.split(line, comments=True) if word != "…"]
        words = words[: words.index(">")] if ">" in words else words
        while "&&" in words:
            cut = words.index("&&")
            yield words[:cut]
            words = words[cut + 1 :]
        if words:
            yield words


def check_script(path: str, arguments: list[str]) -> None:
    assert Path(path).is_file(), f"{path} does not exist"
    script = SCRIPTS.get(Path(path).name)
    if script is not None:
        script(arguments)
    else:
        assert not arguments, f"the options of {path} are not known here; mark the block as not run"


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (extras,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "EXTRAS"
    )
    for word in words[1:]:
        if word not in (".", "-e", "--no-deps"):
            wanted = Requirement(word)
            assert wanted.name != "lever_grpo" or wanted.extras <= {*extras, "dev"}, word


def check(words: list[str]) -> None:
    """Raises if the command, an option of it, or a file of the repository that it names is not there."""
    program, rest = Path(words[0]).name, words[1:]
    if program == "lever-grpo":
        parsed = build_parser().parse_args(rest)
        if rest[0] in SUBCOMMANDS:
            of_the_command = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
            of_the_command.add_argument("--accelerate_config", choices=[*packaged_configs(), NO_LAUNCH])
            of_the_command.add_argument("--num_processes", type=int)
            of_the_command.add_argument("--json", action="store_true")
            SUBCOMMANDS[rest[0]](of_the_command.parse_known_args(parsed.arguments)[1])
    elif program == "accelerate":
        launch = launch_command_parser().parse_args(rest[1:])
        assert rest[0] == "launch" and (launch.config_file is None or Path(launch.config_file).is_file()), words
        check_script(launch.training_script, launch.training_script_args)
    elif program == "torchrun":
        run = get_args_parser().parse_args(rest)
        check_script(run.training_script, run.training_script_args)
    elif program in ("python", "python3"):
        check_script(rest[0], rest[1:])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert rest[0] in targets and all("=" in word for word in rest[1:]), words
    elif program == "pip":
        check_pip(rest)
    else:
        assert words == [".", ".venv/bin/activate"], f"{program} is not known here; mark the block as not run"
    for word in rest:
        if word.startswith(("lever_grpo/", "recipes/", "accelerate_configs/")):
            assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_known(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for words in commands(block):
            try:
                check(words)
            except (Exception, SystemExit) as error:
                pytest.fail(f"{shlex.join(words)}: {error}")


@pytest.mark.parametrize(
    "command",
    [
        "lever-grpo inspect log.json --strikt",
        "lever-grpo generate --config recipes/generate_beams.yaml --beams 3",
        "lever-grpo evaluate --config recipes/none.yaml",
        "accelerate launch --config_file accelerate_configs/none.yaml recipes/okvqa_v3.py",
        "accelerate launch recipes/okvqa_v3.py --config recipes/okvqa_v3.yaml --loss_type gpro",
        "torchrun --nproc_per_node 2 recipes/none.py",
        "make dokumentation",
        "pip install 'lever_grpo[encodings]'",
        "lever-grpo inspect lever_grpo/sample/none/train.parquet",
    ],
)
def test_mistakes_in_commands_are_found(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, OSError, SystemExit)):
        check(shlex.split(command))


# ---- tables ----


def documented_keys(page: str) -> set[str]:
    """Keys in the first columns of the tables under "Logged metrics"."""
    section = (DOCS / page).read_text(encoding="utf-8").partition("## Logged metrics\n")[2]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return {key for cell in cells for key in re.findall(r"`([\w/]+)`", cell)}


def logged_keys(trainer) -> set[str]:
    trainer.train()
    speed = re.compile(r"train_|eval_(runtime|\w+_per_second)$|total_flos|step$")
    return {key for log in trainer.state.log_history for key in log if not speed.match(key)}


def grpo_keys() -> set[str]:
    """Those of the page, with what it says of evaluation."""
    documented = documented_keys("grpo_trainer.md")
    schedules = {"stage", "temperature", "policy_temperature", "beta", "learning_rate", "grad_norm", "epoch"}
    return documented | {f"eval_{key}" for key in documented - schedules if not key.startswith("eval_")}


def test_every_logged_metric_of_grpo_is_defined(planted, tmp_path):
    from planted import make_trainer

    # both kinds of ratio statistics: grpo's and cispo's
    logged = logged_keys(make_trainer(tmp_path / "a", planted)) | logged_keys(
        make_trainer(tmp_path / "b", planted, loss_type="cispo")
    )
    assert logged == grpo_keys()


def test_every_logged_metric_of_sft_is_defined(planted, tmp_path):
    from planted import make_selector

    args = SelectorSFTConfig(
        str(tmp_path), num_train_epochs=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = SelectorSFTTrainer(make_selector(), args, planted.collator, planted.train, planted.validation)
    assert logged_keys(trainer) == documented_keys("sft_trainer.md")


def test_the_guide_names_metrics_and_options_that_exist():
    """Of `policy_does_not_move.md`: whatever stands in code quotes before its table."""
    guide = (DOCS / "policy_does_not_move.md").read_text(encoding="utf-8").partition("## All failure modes")[0]
    names = set(re.findall(r"`(\w[\w/]+)(?:=[^`]*)?`", guide))
    unknown = names - grpo_keys() - GroupBeamGRPOConfig.__dataclass_fields__.keys() - set(LOSS_TYPES)
    assert not unknown and len(names) > 20


def test_every_row_of_the_comparison_names_a_test():
    lines = (DOCS / "comparison.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 5 and (ROOT / row[-1].strip("`")).is_file(), row


# ---- notebook and site ----


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "outputs do not belong in the repository"
    executed = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = "".join(output.get("text", "") for output in executed.cells[-1]["outputs"])
    assert shown.strip(), "the last cell prints the picks"


def test_the_site_builds_without_warnings(tmp_path):
    """Strictly: every page is in the navigation, every link and heading exists, every object of the reference too."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr[-3000:]
    assert (tmp_path / "site" / "quickstart" / "index.html").exists()
