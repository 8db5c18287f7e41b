"""Runs that are killed, told to end, left by a process, or find no room say why, and go on to the same end."""

import multiprocessing
import os
import re
import signal
import socket
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers.trainer
from recipe_runs import arguments, differences, left_behind, run_recipe
from transformers import TrainerCallback

from lever_grpo.atomic import LOCK_FILE, one_run
from lever_grpo.pipeline import parse, run
from lever_grpo.trainer import GroupBeamGRPOConfig, last_checkpoint


MINUTE = 60
EVERY_THIRD = {"save_steps": 3, "eval_steps": 3, "per_device_train_batch_size": 8}


class At(TrainerCallback):
    """Calls something at the end of a step of a stage."""

    def __init__(self, stage, step, call):
        self.stage, self.step, self.call = stage, step, call

    def on_step_end(self, args, state, control, **kwargs):
        if (Path(args.output_dir).name, state.global_step) == (self.stage, self.step):
            self.call()


class AtSave(At):
    """The same, behind a save."""

    def on_step_end(self, *args, **kwargs):
        pass

    def on_save(self, *args, **kwargs):
        super().on_step_end(*args, **kwargs)


def child(words, log, callback=None, environment=None, set_up=None):
    torch.set_num_threads(1)
    if callback is not None:
        transformers.trainer.DEFAULT_CALLBACKS.append(callback)
    if set_up is not None:
        set_up()
    run_recipe(words, log, environment)


def end_of(process, seconds=2 * MINUTE):
    process.join(seconds)
    return process.exitcode


class Starter:
    """Starts runs in `folder / "out"`; their words are in `folder / "log.txt"`."""

    def __init__(self, processes, files, folder):
        self.processes, self.files, self.folder = processes, files, folder
        self.children = []

    def __call__(self, callback=None, environment=None, set_up=None, **options):
        words = arguments(self.files, self.folder / "out", **{**EVERY_THIRD, **options})
        details = (words, self.folder / "log.txt", callback, environment, set_up)
        self.children.append(self.processes.Process(target=child, args=details))
        self.children[-1].start()
        return self.children[-1]

    def two(self, callbacks=(None, None), set_ups=(None, None)):
        """The same in two processes, as a launcher starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self(callback, {"RANK": rank, "LOCAL_RANK": rank, **shared}, set_up, per_device_train_batch_size=4)
            for rank, callback, set_up in zip(("0", "1"), callbacks, set_ups, strict=True)
        ]

    def whole(self):
        """What a run leaves that ended well."""
        ends = [end_of(process) for process in self.children]
        assert ends == [0] * len(ends), (self.folder / "log.txt").read_text()
        return left_behind(self.folder / "out")


@pytest.fixture
def start(processes, planted_files, tmp_path):
    starter = Starter(processes, planted_files, tmp_path)
    yield starter
    for process in starter.children:
        process.kill()


@pytest.fixture(scope="module")
def undisturbed(processes, planted_files, tmp_path_factory):
    starter = Starter(processes, planted_files, tmp_path_factory.mktemp("whole"))
    starter()
    return starter.whole()


@pytest.fixture(scope="module")
def undisturbed_two(processes, planted_files, tmp_path_factory):
    """The same of two processes; and the names of what each of them wrote in the output folder."""
    folder = tmp_path_factory.mktemp("whole-two")
    records = [folder / f"writes-{rank}" for rank in (0, 1)]
    starter = Starter(processes, planted_files, folder)
    starter.two(set_ups=[partial(record_writes, record) for record in records])
    whole = starter.whole()
    return whole, [{x for x in r.read_text().split("\n") if str(folder / "out") in x} for r in records]


# ---- kill -9; the long form, at random moments, is soak.py ----

KILLS = [
    ("sft", 2, At),
    ("sft", 3, AtSave),
    ("grpo", 1, At),
    ("grpo", 3, AtSave),
    ("grpo", 5, At),
    ("grpo", 9, AtSave),
]


def test_killed_again_and_again_the_run_ends_the_same(start, undisturbed, tmp_path):
    """Through all stages, before and behind saves; at every step: tests/trainer/test_resume.py"""
    for stage, step, when in KILLS:
        assert end_of(start(when(stage, step, partial(os._exit, 9)))) == 9, f"{stage}, step {step} was not reached"
        assert not (tmp_path / "out" / "grpo").exists()
    assert end_of(start()) == 0
    assert differences(tmp_path / "out", undisturbed) == []


class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(0.1)


def wait_for(path, process):
    deadline = time.monotonic() + 2 * MINUTE
    while not path.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.0005)
    assert path.exists()


def test_kill_while_a_checkpoint_is_written(start, undisturbed, tmp_path):
    for name in ("sft/checkpoint-3", "grpo/checkpoint-0", "grpo/checkpoint-6"):
        process = start(Slow)
        wait_for(tmp_path / "out" / "checkpoints" / name, process)
        process.kill()
        assert end_of(process) == -signal.SIGKILL
    assert end_of(start()) == 0
    assert differences(tmp_path / "out", undisturbed) == []


# ---- SIGTERM ----


def tell_to_end():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("stage, step", [("sft", 1), ("grpo", 4), ("grpo", 5)])
def test_sigterm_saves_the_step_and_goes_on(start, undisturbed, tmp_path, stage, step):
    # the signal comes at the end of a step: the next one is still made, be it the last of its epoch or not
    assert end_of(start(At(stage, step, tell_to_end))) == 128 + signal.SIGTERM
    folder = tmp_path / "out" / "checkpoints" / stage
    assert last_checkpoint(folder) == str(folder / f"checkpoint-{step + 1}")
    words = (tmp_path / "log.txt").read_text()
    assert f"SIGTERM: stopped behind step {step + 1}, which is saved in {folder}" in words
    assert "--resume_from_checkpoint true" in words and "Traceback" not in words
    assert end_of(start()) == 0
    assert differences(tmp_path / "out", undisturbed) == []


def test_sigterm_in_the_last_step_ends_the_run_behind_it(start, undisturbed, tmp_path):
    assert end_of(start(At("sft", 3, tell_to_end))) == -signal.SIGTERM
    assert not (tmp_path / "out" / "sft").exists()
    assert end_of(start()) == 0
    assert differences(tmp_path / "out", undisturbed) == []


def test_two_processes_agree_on_where_to_end(start, undisturbed_two, tmp_path):
    # only one is told, and both leave behind the same step
    pair = start.two((None, At("grpo", 4, tell_to_end)))
    assert [end_of(process) for process in pair] == [143, 143]
    folder = tmp_path / "out" / "checkpoints" / "grpo"
    assert last_checkpoint(folder) == str(folder / "checkpoint-5")
    assert [end_of(process) for process in start.two()] == [0, 0]
    assert differences(tmp_path / "out", undisturbed_two[0]) == []


# ---- several processes ----


def test_when_one_process_dies_the_other_says_so_and_ends(start, undisturbed_two, tmp_path):
    one, other = start.two((None, At("grpo", 4, partial(os._exit, 9))))
    assert end_of(other) == 9
    assert end_of(one, MINUTE) == 1
    # gloo's words, as a socket notices it
    assert re.search("remote worker|[Cc]onnection (closed|reset) by peer", (tmp_path / "log.txt").read_text())
    assert [end_of(process) for process in start.two()] == [0, 0]
    assert differences(tmp_path / "out", undisturbed_two[0]) == []


def fork_loaders():
    """As in a run of its own; a child of a server of forks would start another server, which imports everything."""
    multiprocessing.set_start_method("fork", force=True)


def kill_loaders():
    """Those of the data, the only processes that a run starts; this one is at work until the signal comes."""
    for loader in multiprocessing.active_children():
        loader.kill()
    time.sleep(2 * MINUTE)


def test_when_a_worker_of_the_data_loader_dies_the_run_says_so_and_ends(start, undisturbed, tmp_path):
    process = start(At("grpo", 4, kill_loaders), set_up=fork_loaders, dataloader_num_workers=1)
    assert end_of(process, 5 * MINUTE) == 1
    # torch's words, or those of the connection, if a batch was just being handed over
    said = r"DataLoader worker \(pid.*\) (is killed by signal|exited unexpectedly)|ConnectionResetError"
    assert re.search(said, (tmp_path / "log.txt").read_text())
    folder = tmp_path / "out" / "checkpoints" / "grpo"
    assert last_checkpoint(folder) == str(folder / "checkpoint-3")
    assert end_of(start(), 5 * MINUTE) == 0
    assert differences(tmp_path / "out", undisturbed) == []


def record_writes(record: Path) -> None:
    """Appends what this process writes to a file: names from Python's own calls and from the libraries that write."""
    import sys

    def note(path):
        with open(record, "a") as stream:
            stream.write(f"{path}\n")

    def hook(event, args):
        if event == "open" and str(args[0]) != str(record) and isinstance(args[1], str) and set("wax+") & set(args[1]):
            note(args[0])
        elif event == "os.rename":
            note(args[0])
            note(args[1])
        elif event in ("os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "shutil.copyfile"):
            note(args[0])

    sys.addaudithook(hook)
    for module, name, place in ((torch, "save", 1), (safetensors.torch, "save_file", 1)):
        original = getattr(module, name)

        def noting(*args, original=original, place=place, **kwargs):
            note(args[place])
            return original(*args, **kwargs)

        setattr(module, name, noting)


def test_only_the_main_process_writes(undisturbed_two):
    main, other = undisturbed_two[1]
    assert {Path(line).name for line in main} >= {"optimizer.pt", "report.json", "rng_state_0.pth"}
    # besides, each process makes the folder that its own random state goes to
    assert {Path(line).name for line in other if "checkpoint-" not in Path(line).name} == {"rng_state_1.pth"}


def test_the_second_run_in_a_folder_is_refused(start, planted_files, undisturbed, tmp_path):
    process = start(Slow)
    wait_for(tmp_path / "out" / LOCK_FILE, process)
    second = parse(arguments(planted_files, tmp_path / "out", overwrite="true"), GroupBeamGRPOConfig)
    with pytest.raises(ValueError, match="out' is being written by another run; wait for its end"):
        run(*second)
    assert end_of(process) == 0
    assert differences(tmp_path / "out", undisturbed) == []


def test_a_folder_is_free_again_however_its_run_ended(tmp_path, processes):
    folder = tmp_path / "new" / "out"
    with one_run(folder):
        assert folder.exists()
    assert not folder.exists()
    with pytest.raises(KeyError), one_run(folder):
        raise KeyError
    killed = processes.Process(target=hold_and_die, args=(folder,))
    killed.start()
    assert end_of(killed) == 9 and (folder / LOCK_FILE).exists()
    with one_run(folder, wanted=False), one_run(folder):
        (folder / "kept").touch()
    assert [path.name for path in folder.iterdir()] == ["kept"]


def hold_and_die(folder):
    with one_run(folder):
        os._exit(9)


def load_in_child(path, cache, barrier, queue):
    from lever_grpo import load_beams

    barrier.wait()
    queue.put(load_beams(path, cache_dir=cache)[:])


def test_a_cache_that_several_processes_fill_at_once(processes, planted_files, tmp_path):
    barrier, queue = processes.Barrier(4), processes.Queue()
    loaders = [
        processes.Process(target=load_in_child, args=(planted_files["train"], tmp_path / "cache", barrier, queue))
        for _ in range(4)
    ]
    for loader in loaders:
        loader.start()
    found = [queue.get(timeout=MINUTE) for _ in loaders]
    assert [end_of(loader) for loader in loaders] == [0] * 4
    assert len(found[0]["query_id"]) == 24 and all(rows == found[0] for rows in found)


# ---- folders that take nothing ----


LARGER = {"hidden_dim": 32, "prior_rank": 8, "model_preset": "v3"}


def limit_files():
    """No file grows beyond 20 kB: a write fails as on a full disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own at `tmp_path / "out"`."""
    folder = tmp_path / "out"
    folder.mkdir()
    mounting = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounting.returncode:
        pytest.skip("mounting is for root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def assert_says_so_and_goes_on(start, tmp_path, stage, step, mend):
    """Behind `step`, the save at the next third step fails."""
    words = (tmp_path / "log.txt").read_text()
    folder = tmp_path / "out" / "checkpoints" / stage
    before = step - step % 3
    broken = folder / f"checkpoint-{before + 3}"
    assert f"OSError: {broken} could not be written (" in words and "make room" in words
    assert not broken.exists() and last_checkpoint(folder) == str(folder / f"checkpoint-{before}")
    mend()
    assert end_of(start(**LARGER)) == 0


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_no_room_for_a_file(start, tmp_path):
    assert end_of(start(At("sft", 1, limit_files), **LARGER)) == 1
    assert_says_so_and_goes_on(start, tmp_path, "sft", 1, mend=lambda: None)


class AtEnd(At):
    """The same, behind the training of a stage."""

    def on_step_end(self, *args, **kwargs):
        pass

    def on_train_end(self, *args, **kwargs):
        super().on_step_end(*args, **kwargs)


@pytest.mark.skipif(os.name != "posix", reason="limits of file sizes are POSIX")
def test_no_room_for_a_selector(start, tmp_path):
    assert end_of(start(AtEnd("sft", 3, limit_files), **LARGER)) == 1
    words, folder = (tmp_path / "log.txt").read_text(), tmp_path / "out"
    assert f"OSError: {folder / 'sft'} could not be written (" in words and "make room" in words
    assert not (folder / "sft").exists() and not list(folder.glob(".*.partial"))
    assert end_of(start(**LARGER)) == 0


def test_a_full_disk(start, disk, tmp_path):
    assert end_of(start(At("grpo", 4, partial(leave_no_room, disk)), **LARGER)) == 1
    assert_says_so_and_goes_on(start, tmp_path, "grpo", 4, mend=lambda: remount(disk, "rw,size=100m"))


def leave_no_room(folder):
    used = sum(path.stat().st_blocks for path in folder.rglob("*")) // 2  # in kB
    remount(folder, f"size={used + 16}k")


def test_a_folder_that_cannot_be_made(planted_files, tmp_path):
    (tmp_path / "file").touch()
    words = parse(arguments(planted_files, tmp_path / "file" / "out"), GroupBeamGRPOConfig)
    with pytest.raises(OSError, match="file"):
        run(*words)
