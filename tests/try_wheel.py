"""Builds the wheel, installs it into an empty environment, and uses it there as a stranger would.

No test that pytest collects, as it installs packages: `make wheel-test`. Everything happens in a temporary folder
outside the checkout, and the only Hub is the one on the loopback. One line a step; the first that fails ends it with
exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
TASK = "country_facts"
REPOSITORY = "me/from-the-wheel"
# short: what is tried is the installation
TRAIN = ("--agreement_steps", "0", "--sft_epochs", "1", "--rce_epochs", "1", "--grpo_epochs", "1", "--use_cpu", "true")
WHERE = """
import lever_grpo
print(lever_grpo.__version__, lever_grpo.__file__, lever_grpo.load_sample({task!r}).train, sep="\\n")
"""
PICKS = """
import json, sys
from transformers import AutoModel
from lever_grpo.inference import choose
from lever_grpo.pipeline import RecipeArguments, load_task
data = load_task(RecipeArguments(task={task!r}))
print(json.dumps(choose(AutoModel.from_pretrained(sys.argv[1]), data.heldout, data.collator).tolist()))
"""


def run(command: Sequence[str | Path], cwd: Path, environment: dict[str, str] | None = None) -> str:
    """What a command prints.

    Raises:
        RuntimeError: It did not exit with 0.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        message = f"{shlex.join(words)} exited with {done.returncode}, expected 0"
        raise RuntimeError(f"{message}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return done.stdout


def build_wheel(folder: Path) -> Path:
    """The wheel of a copy of the working tree in an empty folder, so that nothing is built inside it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "lever_grpo", folder / "lever_grpo", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests" / "metrics", folder / "tests" / "metrics")  # which the wheel must leave out
    shutil.copytree(ROOT / "accelerate_configs", folder / "accelerate_configs")
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    return folder / "dist" / run([sys.executable, "-c", build], folder).strip().splitlines()[-1]


def install(wheel: Path, environment: Path, python: str) -> None:
    """Into a new environment, with all that the wheel requires; by uv where there is one."""
    interpreter = environment / "bin" / "python"
    if shutil.which("uv"):
        run(["uv", "venv", "--python", python, environment], wheel.parent)
        run(["uv", "pip", "install", "--python", interpreter, wheel], wheel.parent)
    else:
        run([python, "-m", "venv", environment], wheel.parent)
        run([interpreter, "-m", "pip", "install", wheel], wheel.parent)


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """Says on one line how it went, and ends the program if it did not go well."""
    start = time.monotonic()
    try:
        yield
    except Exception as error:
        print(f"failed  {title}\n{error}")
        raise SystemExit(1) from error
    print(f"ok      {title} ({time.monotonic() - start:.0f} s)", flush=True)


def expect(found: object, wanted: object, what: str) -> None:
    """Raises ValueError where two values differ."""
    if found != wanted:
        raise ValueError(f"{what}: expected {wanted!r}, found {found!r}")


def try_wheel(folder: Path, python: str) -> None:
    """All steps, in an empty folder."""
    sys.path.insert(0, str(ROOT / "tests" / "hub"))
    from hub_server import Hub, client_environment

    for name in ("build", "work", "home", "elsewhere", "empty_home"):
        (folder / name).mkdir()
    work = folder / "work"
    with step("build the wheel from a copy"):
        wheel = build_wheel(folder / "build")
    with step(f"install {wheel.name} into an empty environment"):
        install(wheel, folder / "environment", python)
    shutil.rmtree(folder / "build")

    interpreter, program = (folder / "environment" / "bin" / name for name in ("python", "lever-grpo"))
    with Hub() as hub:
        variables = client_environment(hub, folder / "home")

        with step("import it from the environment, and not from the checkout"):
            version, module, log = run([interpreter, "-c", WHERE.format(task=TASK)], work, variables).splitlines()
            expect(Path(module).is_relative_to(folder / "environment"), True, module)
        with step("lever-grpo env"):
            said = json.loads(run([program, "env", "--json"], work, variables))
            expect(said["lever_grpo"], version, "version")
        with step("lever-grpo inspect"):
            report = json.loads(run([program, "inspect", log, "--json"], work, variables))
            expect(report["groups"] > 100, True, f"more than 100 groups in {log}")
        with step("lever-grpo train"):
            given = ["--task", TASK, *TRAIN, "--output_dir", "run", "--report_to", "none"]
            run([program, "train", *given], work, variables)
            expect((work / "run" / "report.json").is_file(), True, "run/report.json")
        with step("nothing so far asked anything of a Hub"):
            expect(hub.requests, [], "requests")
        with step("lever-grpo push"):
            run([program, "push", "run", REPOSITORY], work, variables)
            pushed = hub.files(REPOSITORY)["model.safetensors"]
            expect(pushed == (work / "run" / "grpo" / "model.safetensors").read_bytes(), True, "the weights pushed")
        with step("from_pretrained in a new process with an empty cache picks the same"):
            picks = PICKS.format(task=TASK)
            own = json.loads(run([interpreter, "-c", picks, work / "run" / "grpo"], work, variables))
            shutil.rmtree(work / "run")
            elsewhere = client_environment(hub, folder / "empty_home")
            pulled = json.loads(run([interpreter, "-c", picks, REPOSITORY], folder / "elsewhere", elsewhere))
            expect(len(own) >= 50, True, "picks for at least 50 queries")
            expect(pulled, own, "picks")
        with step("lever-grpo demo --help"):
            expect("--selectors" in run([program, "demo", "--help"], work, variables), True, "--selectors in the help")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lever-grpo-wheel-") as temporary:
        try_wheel(Path(os.path.realpath(temporary)), arguments.python)
