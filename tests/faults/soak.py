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
from concurrent.futures import ThreadPoolExecutor
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
STAGES = ("start", "SFT", "agreement", "RCE", "GRPO", "report")


class Run:
    """The recipe in processes of its own."""

    def __init__(self, files: dict[str, str], output: Path, processes: int):
        words = arguments(files, output, **({"per_device_train_batch_size": 2} if processes == 2 else {}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] * (processes == 2)
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

    def wait_for_stage(self, stage: str) -> bool:
        """Whether the run came to this stage."""
        while self.parent.poll() is None:
            if STAGES.index(where(self.output)) >= STAGES.index(stage):
                return True
            time.sleep(0.002)
        return False

    def wait_for_a_save(self, seconds: float) -> None:
        """Waits for a checkpoint or a selector that is not there yet."""

        def folders() -> set[str]:
            return {entry.path for f in (self.output, *self.output.glob("checkpoints/*")) for entry in os.scandir(f)}

        before, deadline = folders(), time.monotonic() + seconds
        while self.parent.poll() is None and time.monotonic() < deadline and folders() <= before:
            time.sleep(0.0005)

    def kill(self, rng: random.Random) -> str:
        """What was killed; the rest of a run that lost one worker has to end by itself."""
        workers = self.workers
        if self.processes == 2 and rng.random() < 0.5 and len(workers) == 2:  # a launcher at its end has none
            number = rng.randrange(2)
            workers[number].kill()
            self.parent.wait(GONE)
            killed = f"worker {number}"
        else:
            os.killpg(self.parent.pid, signal.SIGKILL)
            for worker in workers[self.processes == 1 :]:  # they have sessions of their own
                worker.kill()
            killed = "all"
        self.parent.wait(GONE)
        psutil.wait_procs(workers, GONE)
        return killed


class Soak:
    """Runs of so many processes that are killed, and what an undisturbed one left."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes
        self.files = planted.write_files(folder, planted.Planted())
        whole = self.start("whole")
        whole.wait_until_it_writes()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        before = time.monotonic()
        while whole.parent.poll() is None:
            time.sleep(0.01)
            now = time.monotonic()
            self.seconds[where(whole.output)] += now - before
            before = now
        if whole.parent.returncode:
            raise SystemExit(f"the undisturbed run failed; see {whole.log}")
        self.undisturbed = left_behind(whole.output)
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        print(f"{processes} process(es): {stages}", flush=True)

    def start(self, name: str) -> Run:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        return Run(self.files, folder / "out", self.processes)

    def kill_runs(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Kills runs, each as often as it happens, until there were so many kills; compares them at their end."""
        kills: list[dict[str, Any]] = []
        rng, runs = random.Random(seed), 0
        while len(kills) < number:
            runs += 1
            name, before = f"run-{seed}-{runs}", len(kills)
            while not (ended := self.live(name, rng, kills, number)):
                pass
            wrong = [ended] if ended != "whole" else differences(self.folder / name / "out", self.undisturbed)
            for kill in kills[before:]:
                kill["handled"] = not wrong
            print(f"{name}: {len(kills)} of {number} kills; {'the same' if not wrong else wrong}", flush=True)
        return kills

    def live(self, name: str, rng: random.Random, kills: list[dict[str, Any]], number: int) -> str | None:
        """
        Starts or goes on with a run and kills it at a random moment of a random stage of those to come, unless it is
        over first, was killed in its last stage before, or there were enough; how it ended.
        """
        begun = where(self.folder / name / "out")
        run = self.start(name)
        wanted, saving = rng.choice(STAGES[STAGES.index(begun) :]), rng.random() < 0.5
        more = begun != STAGES[-1] and len(kills) < number
        if more and run.wait_until_it_writes() and run.wait_for_stage(wanted):
            try:
                run.parent.wait(rng.uniform(0, self.seconds[wanted]))
            except subprocess.TimeoutExpired:
                if saving:
                    run.wait_for_a_save(self.seconds[wanted])
                    time.sleep(rng.uniform(0, 0.02))
                stage = where(run.output)
                if run.parent.poll() is None:
                    kills.append({"stage": stage, "during_a_save": saving, "killed": run.kill(rng)})
                    return None
        code = run.parent.wait(WAIT)
        return "whole" if code == 0 else f"exit code {code}, see {run.log}"


def summary(processes: int, kills: list[dict[str, Any]]) -> dict[str, Any]:
    stages = [kill["stage"] for kill in kills]
    return {
        "processes": processes,
        "kills": len(kills),
        "kills_handled": sum(kill["handled"] for kill in kills),
        "during_saves": sum(kill["during_a_save"] for kill in kills),
        "of_one_worker": sum(kill["killed"] != "all" for kill in kills),
        "stages": {stage: stages.count(stage) for stage in STAGES if stage in stages},
    }


def where(output: Path) -> str:
    """The last stage that has begun to write."""
    if (output / "grpo").exists():
        return "report"
    for stage, name in (("GRPO", "grpo/rce"), ("RCE", "grpo"), ("SFT", "sft")):
        if (output / "checkpoints" / name).exists():
            return "agreement" if stage == "SFT" and (output / "sft").exists() else stage
    return "start"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of one process and of two, four to one (default 50)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    parser.add_argument("--output", type=Path, default=Path("outputs/soak"), help="folder of results.json")
    parser.add_argument("--page", type=Path, help="the page whose table is to be written")
    args = parser.parse_args()
    two = args.kills // 5
    jobs = max(1, (os.cpu_count() or 1) // 2)
    kills = []
    for processes, number, chains in ((1, args.kills - two, 2 * jobs), (2, two, jobs)):
        shares = [number // chains + (chain < number % chains) for chain in range(chains)]
        seeds = range(args.seed + 100 * processes, args.seed + 100 * processes + chains)
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(chains) as pool:
            found = pool.map(Soak(Path(folder), processes).kill_runs, shares, seeds)
            kills.append(summary(processes, [kill for share in found for kill in share]))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(kills, indent=2) + "\n")
    print(json.dumps(kills, indent=2))
    whole = all(result["kills_handled"] == result["kills"] for result in kills)
    if args.page is not None:
        whole &= write_table(args.page, kills)
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
