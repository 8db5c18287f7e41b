"""The documentation: its code runs, its commands are known, its tables tell the truth, the site builds.

Every block of Python and of bash runs, but for those under `<!-- not run: reason -->`, whose commands are read by the
real parsers. Blocks of JSON and YAML are logs and configs, and are read as such. The README's Python blocks and the
relative links are tested in `test_packaging.py`.
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
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from PIL import Image
from small_language_models import TOKENIZER, llama
from torch.distributed.run import get_args_parser

from lever_grpo import (
    EmbeddingStore,
    GroupBeamGRPOConfig,
    PointerSelector,
    PointerSelectorConfig,
    SelectorSFTConfig,
    SelectorSFTTrainer,
    load_beams,
    load_sample,
)
from lever_grpo.cli import build_parser, train_classes
from lever_grpo.demo import parse_demo
from lever_grpo.objectives.policy_losses import LOSS_TYPES
from lever_grpo.pipeline import parse
from lever_grpo.pipeline.evaluate import parse_evaluate
from lever_grpo.pipeline.generate import parse_generate
from lever_grpo.pipeline.launch import NO_LAUNCH, packaged_configs
from lever_grpo.pipeline.parsing import read_values
from lever_grpo.search.features import FeatureEncoder, FeatureMap, save_encoders


ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ALL_PAGES = [
    *PAGES,
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("benchmarks/*.md")),
    *sorted(ROOT.glob("recipes/*.md")),
]
BLOCK = re.compile(
    r"^(?:[ \t]*<!-- not run: (?P<reason>[^\n]+?) -->\n)?[ \t]*```(?P<language>\w*)\n(?P<code>.*?)^[ \t]*```$",
    re.MULTILINE | re.DOTALL,
)
DRAWN = ("mermaid", "text")  # what nothing could run
Parser = Callable[[list[str]], object]


class Block(NamedTuple):
    language: str
    code: str
    reason: str | None  # why it is not run


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of some languages, in the order of the page."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(b["language"], dedent(b["code"]), b["reason"]) for b in found if b["language"] in languages]


def to_run(page: Path) -> list[Block]:
    """All blocks of code that are not marked as not run."""
    languages = ("bash",) if page in IN_PACKAGING else ("python", "bash")
    return [block for block in blocks(page, *languages) if block.reason is None]


# ---- blocks that run ----


def small_log(path: str = "my_log.json") -> None:
    """Forty groups of the sample, in our own format."""
    groups = load_sample("country_facts").load("train", shots=2).select(range(40))
    columns = ("query_id", "candidate_ids", "sequences", "scores")
    records = [{name: row[name] for name in columns} for row in groups]
    Path(path).write_text("".join(json.dumps(record) + "\n" for record in records))


def log_without_pools() -> None:
    """The same log, its pools in a file of their own."""
    small_log()
    records = [json.loads(line) for line in Path("my_log.json").read_text().splitlines()]
    pools = [{"query_id": record["query_id"], "candidate_ids": record.pop("candidate_ids")} for record in records]
    for record, pool in zip(records, pools, strict=True):
        sequences = zip(record["sequences"], record.pop("scores"), strict=True)
        ids = [([pool["candidate_ids"][position] for position in picks], score) for picks, score in sequences]
        record["sequences"] = [{"search_order": picks, "score": score} for picks, score in ids]
    for path, rows in (("my_log.json", records), ("my_pools.jsonl", pools)):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def selector_and_rows() -> None:
    """A selector that embeds rows by a tiny model, and rows of each side."""
    llama().save_pretrained("llama")
    TOKENIZER.save_pretrained("llama")
    folder = "outputs/supersense/grpo"
    config = PointerSelectorConfig(query_features={"question": 64}, candidate_features={"question": 64})
    PointerSelector(config).save_pretrained(folder)
    as_it_is = FeatureMap(np.zeros((2, 32)), np.ones((2, 32)))
    encoder = FeatureEncoder("hidden_states", model="llama", layers=(1, 2))
    save_encoders(folder, {"question": encoder}, {"question": as_it_is})
    for name, known in {"candidates": {"answer": "a"}, "queries": {}}.items():
        rows = [{"id": i, "question": f"{name} {i}?", **known} for i in range(4)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


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
    Path("outputs/okvqa_beams").mkdir(parents=True)
    pairs = [[i, j] for i in range(4) for j in range(4) if i != j]
    groups = [{"query_id": i, "candidate_ids": [20, 21, 22, 23], "sequences": pairs} for i in range(8)]
    records = [group | {"scores": np.linspace(-3, -1, len(pairs)).tolist()} for group in groups]
    Path("outputs/okvqa_beams/beams.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def lever_plus_embeddings() -> None:
    """What Lever-Plus exports: one tensor, a row for each row of the training split."""
    torch.save(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).half(), "query_embeddings.pt")


# what a page takes for granted
FILES: dict[str, Callable[[], None]] = {
    "docs/convert.md": lever_plus_checkpoint,
    "docs/evaluate.md": selector_and_rows,
    "docs/index.md": small_log,
    "MIGRATION.md": lever_plus_embeddings,
    "docs/okvqa.md": small_okvqa,
    "README.md": log_without_pools,
}
IN_PACKAGING = {ROOT / "README.md"}  # its Python
RUNNING = {page.relative_to(ROOT).as_posix(): page for page in ALL_PAGES if to_run(page)}


def run_bash(code: str) -> str:
    """What a block prints, in a shell of its own that ends at the first command that fails, as in a clone."""
    for name in ("recipes", "accelerate_configs", "lever_grpo"):
        if not Path(name).exists():
            Path(name).symlink_to(ROOT / name)
    if not Path(".venv").exists():
        Path(".venv").symlink_to(sys.prefix)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HOME": os.getcwd(), "PYTHONPATH": str(ROOT)}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{code}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.parametrize("name", RUNNING)
def test_blocks_run(name, tmp_path, monkeypatch):
    """In the order of the page, in a folder that holds what the page takes for granted; Python in one namespace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "tests")
    FILES.get(name, lambda: None)()
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in to_run(RUNNING[name]):
        if block.language == "bash":
            run_bash(block.code)
        else:
            exec(compile(block.code, str(RUNNING[name]), "exec"), namespace)
    if name == "docs/cli.md":
        assert "lever" in Path(".local/share/bash-completion/completions/lever-grpo").read_text()
    if name == "docs/convert.md":
        assert (tmp_path / "outputs" / "lever_plus" / "model.safetensors").exists()
    if name == "docs/evaluate.md":
        assert len(Path("picks.jsonl").read_text().splitlines()) == 4
    if name == "MIGRATION.md":
        exported = torch.load("query_embeddings.pt", weights_only=True)
        assert np.array_equal(EmbeddingStore.open("embeddings")["embedding"], exported.numpy())
    if name == "docs/okvqa.md":
        pools = [json.loads(line) for line in Path("okvqa/pools.jsonl").read_text().splitlines()]
        assert [pool["query_id"] for pool in pools] == [40, 41, 42, 43, 44]
        assert all(len(pool["candidate_ids"]) == 32 and max(pool["candidate_ids"]) < 40 for pool in pools)
    if name == "docs/quickstart.md":
        (query, shown) = namespace["query"], namespace["picked"].demonstrations
        assert len({row.entity for row in (query, *shown)}) == 3, "rows about the query's own country are not shown"
        left = {path.name for path in Path("outputs/quickstart").iterdir()}
        assert left >= {"sft", "agreement", "rce", "grpo", "report.md", "report.json"}


def test_no_block_is_of_another_kind():
    tested = ("python", "bash", "json", "yaml", *DRAWN)
    for page in ALL_PAGES:
        fences = re.findall(r"^[ \t]*```", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(page, *tested)), f"{page.name} has a block that no test knows"


def test_python_blocks_that_are_not_run_compile():
    not_run = [block for page in ALL_PAGES for block in blocks(page, "python") if block.reason]
    assert len(not_run) <= 2
    for block in not_run:
        compile(block.code, "page", "exec")


def test_the_readme_has_the_blocks_that_are_tested():
    assert len(blocks(ROOT / "README.md", "python")) == 2  # by name in test_packaging.py


# ---- blocks that are read ----


JSON_BLOCKS = [block.code for page in ALL_PAGES for block in blocks(page, "json")]
YAML_BLOCKS = [block.code for page in ALL_PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("code", JSON_BLOCKS)
def test_json_blocks_are_logs(code, tmp_path):
    record = json.loads(code)
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(record))
    (group,) = load_beams(str(path), rebuild_pools=True, cache_dir=str(tmp_path))
    assert group["query_id"] == 7211 and {2229, 7232} <= set(group["candidate_ids"]) and group["scores"]


@pytest.mark.parametrize("code", YAML_BLOCKS)
def test_yaml_blocks_are_configs(code, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(code)
    assert read_values(train_classes(), ["--config", str(path)], "lever-grpo train")


# ---- commands ----


OF_THE_SHELL = {".", "cd", "done", "for", "mkdir", "wget"}


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
        source = Path(path).read_text(encoding="utf-8")
        for word in arguments:
            assert not word.startswith("--") or f'"{word}"' in source, f"{path} does not know {word}"


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
    program, rest = Path(words[0]).name or words[0], words[1:]  # "." has no name
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
        assert program in OF_THE_SHELL, f"{program} is not known here"
    for word in rest:
        if word.startswith(("lever_grpo/", "recipes/", "accelerate_configs/")):
            assert (ROOT / word).exists(), f"{word} does not exist"


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_known(page, monkeypatch):
    """Those that are not run too."""
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for words in commands(block.code):
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
        "python benchmarks/scoring.py --querys 2",
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
    return {key for cell in cells for key in re.findall(r"`([\w/<>]+)`", cell)}


def logged_keys(trainer) -> set[str]:
    trainer.train()
    speed = re.compile(r"train_|eval_(runtime|\w+_per_second)$|total_flos|step$")
    keys = {key for log in trainer.state.log_history for key in log if not speed.match(key)}
    return {re.sub(r"rewards/\w+/", "rewards/<level>/", key) for key in keys}


LEVELS = {"reward_weights": {"beam": 1.0, "task": 1.0}, "task_reward": "correct"}


def grpo_keys() -> set[str]:
    """Those of the page, with what it says of evaluation."""
    documented = documented_keys("grpo_trainer.md")
    schedules = {"stage", "temperature", "policy_temperature", "beta", "learning_rate", "grad_norm", "epoch"}
    return documented | {f"eval_{key}" for key in documented - schedules if not key.startswith("eval_")}


def test_every_logged_metric_of_grpo_is_defined(planted, tmp_path):
    from planted import make_trainer

    # both kinds of ratio statistics: grpo's and cispo's
    logged = logged_keys(make_trainer(tmp_path / "a", planted, **LEVELS)) | logged_keys(
        make_trainer(tmp_path / "b", planted, loss_type="cispo")
    )
    assert logged == grpo_keys()


def test_every_logged_metric_of_sft_is_defined(planted, tmp_path):
    from planted import make_selector

    args = SelectorSFTConfig(
        str(tmp_path), num_train_epochs=1, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **LEVELS
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
