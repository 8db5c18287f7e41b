"""
Kills the recipe at random moments of all its stages, in one process and in two, and checks that the run which is taken
up again ends as if nothing had happened; then counts what the tests of faults and files try, for docs/reliability.md.

    python tests/faults/soak.py [--kills 50] [--seed 0] [--output outputs/soak] [--page docs/reliability.md]

Half of the kills wait for a checkpoint or a selector that is being written. Of two processes the launcher and all
workers die, or one worker alone.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil


HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import planted  # noqa: E402
from recipe_runs import RECIPE, arguments, differences, left_behind  # noqa: E402
from reliability import write_table  # noqa: E402

from lever_grpo.atomic import LOCK_FILE  # noqa: E402


WAIT = 600  # seconds for a process that does not come to its end
GONE = 60  # seconds in which the others must be gone when one dies


class Run:
    """The recipe in processes of its own."""

    def __init__(self, files: dict[str, str], output: Path, processes: int):
        words = arguments(files, output, **({"per_device_train_batch_size": 2} if processes == 2 else {}))
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"] * (processes == 2)
        self.output, self.processes = output, processes
        self.log = output.with_name("log.txt")
        with self.log.open("ab") as stream:
            self.parent = subprocess.Popen(
                [sys.executable, *launcher, str(RECIPE), *words],
                stdout=stream,
                stderr=stream,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            )

    @property
    def workers(self) -> list[psutil.Process]:
        parent = psutil.Process(self.parent.pid)
        return parent.children() if self.processes == 2 else [parent]

    def wait_until_it_writes(self) -> bool:
        """Whether the run came to where it holds its folder."""
        while self.parent.poll() is None:
            try:
                if any(file.path.endswith(LOCK_FILE) for w in self.workers for file in w.open_files()):
                    return True
            except psutil.Error:  # it has just ended
                continue
            time.sleep(0.01)
        return False

    def wait_for_a_save(self, seconds: float) -> None:
        """Waits for a checkpoint or a selector that is not there yet."""

        def folders() -> set[str]:
            return {entry.path for f in (self.output, *self.output.glob("checkpoints/*")) for entry in os.scandir(f)}

        before, deadline = folders(), time.monotonic() + seconds
        while self.parent.poll() is None and time.monotonic() < deadline and folders() <= before:
            time.sleep(0.0005)

    def kill(self, rng: random.Random) -> str:
        """What was killed; the rest of a run that lost one worker ends by itself."""
        if self.processes == 2 and rng.random() < 0.5:
            worker = rng.randrange(2)
            self.workers[worker].kill()
            self.parent.wait(GONE)
            return f"worker {worker}"
        os.killpg(self.parent.pid, signal.SIGKILL)  # the launcher; its workers have sessions of their own
        return "all"


def soak(folder: Path, kills: int, processes: int, rng: random.Random) -> dict[str, Any]:
    """Kills runs until there were so many kills; every run that came to its end is compared."""
    files = planted.write_files(folder, planted.Planted())
    whole = Run(files, make(folder / "whole") / "out", processes)
    started = time.monotonic()
    whole.wait_until_it_writes()
    writing = time.monotonic()
    if whole.parent.wait(WAIT):
        raise SystemExit(f"the undisturbed run failed; see {whole.log}")
    seconds = time.monotonic() - writing
    undisturbed = left_behind(whole.output)
    print(f"{processes} process(es): {seconds:.1f} s of work behind {writing - started:.1f} s of imports", flush=True)

    done: list[dict[str, Any]] = []
    runs = failures = handled = 0
    while len(done) < kills:
        runs += 1
        before = len(done)
        output = make(folder / f"run-{runs}") / "out"
        while not (ended := one_life(files, output, processes, rng, seconds, done, kills)):
            pass
        wrong = [ended] if ended != "whole" else differences(output, undisturbed)
        failures += bool(wrong)
        handled += 0 if wrong else len(done) - before
        print(f"run {runs}: {len(done)} kills so far; {'the same' if not wrong else wrong}", flush=True)
    stages = [kill["stage"] for kill in done]
    return {
        "processes": processes,
        "kills": len(done),
        "kills_handled": handled,
        "during_saves": sum(kill["during_a_save"] for kill in done),
        "of_one_worker": sum(kill["killed"].startswith("worker") for kill in done),
        "stages": {stage: stages.count(stage) for stage in dict.fromkeys(stages)},
        "runs": runs,
        "runs_that_ended_differently": failures,
    }


def one_life(files, output, processes, rng, seconds, done, kills) -> str | None:
    """Starts or goes on with a run, and kills it unless it is over before, or there were enough; says how it ended."""
    run = Run(files, output, processes)
    moment, saving = rng.uniform(0, seconds), rng.random() < 0.5
    if run.wait_until_it_writes() and len(done) < kills:
        try:
            run.parent.wait(moment)
        except subprocess.TimeoutExpired:
            if saving:
                run.wait_for_a_save(seconds)
                time.sleep(rng.uniform(0, 0.02))
            stage = where(output)
            if run.parent.poll() is None:
                workers = run.workers
                done.append({"stage": stage, "during_a_save": saving, "killed": run.kill(rng)})
                for worker in workers:  # those whose launcher is dead
                    if worker.is_running():
                        worker.kill()
                psutil.wait_procs(workers, GONE)
                run.parent.wait(GONE)
                return None
    code = run.parent.wait(WAIT)
    return "whole" if code == 0 else f"exit code {code}, see {run.log}"


def where(output: Path) -> str:
    """The last stage that has begun to write."""
    if (output / "grpo").exists():
        return "report"
    for stage, name in (("GRPO", "grpo/rce"), ("RCE", "grpo"), ("SFT", "sft")):
        if (output / "checkpoints" / name).exists():
            return "agreement" if stage == "SFT" and (output / "sft").exists() else stage
    return "start"


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of one process and of two, four to one (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/soak"), help="folder of results.json")
    parser.add_argument("--page", type=Path, help="the page whose table is to be written")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    pairs = args.kills // 5
    with tempfile.TemporaryDirectory() as folder:
        kills = [
            soak(make(Path(folder, str(n))), number, n, rng) for n, number in ((1, args.kills - pairs), (2, pairs))
        ]
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(kills, indent=2) + "\n")
    print(json.dumps(kills, indent=2))
    whole = all(result["kills_handled"] == result["kills"] for result in kills)
    if args.page is not None:
        whole &= write_table(args.page, kills)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
