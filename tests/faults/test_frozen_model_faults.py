"""`generate` and `evaluate` in folders that another run holds, that take nothing, or on a disk that is full."""

import resource
import subprocess
from pathlib import Path

import numpy as np
import pytest

from lever_grpo.atomic import one_run
from lever_grpo.cli import main
from lever_grpo.inference import read_answers
from lever_grpo.pipeline.evaluate import EvaluateArguments, evaluate
from lever_grpo.pipeline.generate import GenerateArguments, generate


MINUTE = 60
COMMANDS = ("train", "generate", "evaluate")


class Constant:
    """A model of one opinion. From its second batch on, no file grows beyond `room` bytes, as on a full disk."""

    def __init__(self, room=None):
        self.room, self.calls = room, 0

    def score(self, prompts):
        self.calls += 1
        if self.room is not None and self.calls > 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.room))
        return [np.array([-1.0])] * len(prompts)

    def answer(self, prompts, max_new_tokens=10):
        return ["?"] * len(prompts)

    def describe(self):
        return {"backend": "constant"}


def make_log(output, scorer):
    options = {"task": "emoji", "sampler": "random", "pool_size": 6, "num_queries": 6, "batch_queries": 2}
    generate(GenerateArguments(**options, judge="none", output_dir=str(output), disable_tqdm=True), scorer)
    return (output / "beams.jsonl").read_bytes()


def make_answers(output, scorer):
    options = {"task": "emoji", "num_queries": 6, "num_shots": [1], "baselines": ["zero_shot", "random"]}
    evaluate(EvaluateArguments(**options, batch_size=4, output_dir=str(output), disable_tqdm=True), scorer)
    return read_answers(output / "answers")


def hold(folder, held, free):
    with one_run(folder):
        held.set()
        free.wait(5 * MINUTE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_another_run_holds_is_refused(command, processes, tmp_path, capsys):
    held, free = processes.Event(), processes.Event()
    other = processes.Process(target=hold, args=(tmp_path / "out", held, free))
    other.start()
    try:
        assert held.wait(2 * MINUTE)
        assert main([command, "--output_dir", str(tmp_path / "out")]) == 2
        assert "out' is being written by another run; wait for its end" in capsys.readouterr().err
    finally:
        free.set()
        other.join(MINUTE)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def read_only(tmp_path):
    """A folder that takes nothing: for root, who may write where it is forbidden, a file system of its own."""
    folder = tmp_path / "out"
    folder.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=False).returncode
    folder.chmod(0o500) if not mounted else None
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_takes_nothing_is_named(command, read_only, capsys):
    assert main([command, "--output_dir", str(read_only / "new")]) == 2
    message = capsys.readouterr().err
    assert f"'{read_only}" in message and ("Read-only file system" in message or "Permission denied" in message)


def fill_the_disk(make, output, answer):
    try:
        make(output, Constant(room=100))
    except OSError as error:
        answer.put((error.filename, str(error)))


@pytest.mark.parametrize(("make", "part"), [(make_log, "shards"), (make_answers, "answers")])
def test_a_full_disk_names_the_file_and_loses_nothing_before_it(make, part, processes, tmp_path):
    output, answer = tmp_path / "out", processes.Queue()
    child = processes.Process(target=fill_the_disk, args=(make, output, answer))
    child.start()
    name, message = answer.get(timeout=2 * MINUTE)
    child.join(MINUTE)
    assert name.startswith(f"{output / part}/") and message == f"[Errno 27] File too large: {name!r}"
    assert not list(output.rglob(".writing-*")) and not Path(name).exists()
    assert make(output, Constant()) == make(tmp_path / "undisturbed", Constant())
