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
import threading
import time
import urllib.request
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
PAGE = """
import sys
from gradio_client import Client
from lever_grpo import load_sample
query = load_sample({task!r}).load("heldout", shots=2)["query_id"][0]
print(Client(sys.argv[1], verbose=False).predict(query, 2, api_name="/pick"))
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


def make_environment(environment: Path, python: str) -> None:
    """An empty one, by uv where there is one."""
    make = ["uv", "venv", "--python", python] if shutil.which("uv") else [python, "-m", "venv"]
    run([*make, environment], environment.parent)


def install(wheel: Path, environment: Path, extras: str = "") -> None:
    """With all that the wheel and its extras (`"[demo]"`) require; by uv where there is one."""
    interpreter = environment / "bin" / "python"
    pip = ["uv", "pip"] if shutil.which("uv") else [interpreter, "-m", "pip"]
    run([*pip, "install", *(["--python", interpreter] if pip[0] == "uv" else []), f"{wheel}{extras}"], wheel.parent)


@contextlib.contextmanager
def serve(command: Sequence[str | Path], cwd: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address that a command prints when it serves; it is ended at the end.

    Raises:
        RuntimeError: It printed none within five minutes.
    """
    process = subprocess.Popen(
        [str(word) for word in command], cwd=cwd, env=environment, stdout=subprocess.PIPE, text=True
    )
    clock = threading.Timer(300, process.kill)
    clock.start()
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise RuntimeError(f"{command[0]} printed no address and exited with {process.wait()}")
        yield address
    finally:
        clock.cancel()
        process.kill()
        process.wait()


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
        make_environment(folder / "environment", python)
        install(wheel, folder / "environment")

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
        with step("lever-grpo demo, with the extra, answers to a browser and to a program"):
            install(wheel, folder / "environment", "[demo]")
            shutil.rmtree(folder / "build")
            given = ["--task", TASK, "--sft", "run/sft", "--grpo", "run/grpo", "--ask", "false"]
            with serve([program, "demo", *given], work, variables) as address:
                with urllib.request.urlopen(address, timeout=60) as page:
                    expect(page.status, 200, "status of the page")
                shown = run([interpreter, "-c", PAGE.format(task=TASK), address], work, variables)
                for method in ("random", "similarity", "sft", "grpo"):
                    expect(f'data-method="{method}"' in shown, True, f"the picks of {method}")
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment (default: this one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lever-grpo-wheel-") as temporary:
        try_wheel(Path(os.path.realpath(temporary)), arguments.python)
