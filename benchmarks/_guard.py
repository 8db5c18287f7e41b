"""
Fails when a ratio fell by more than 30 % below the committed one: `make bench-quick`, a minute on an idle machine.

Only ratios of two sides that are timed in turns are compared, as milliseconds of another machine say nothing: the
step against the expanded one and against its products, the training loop against a bare one, `load_beams` against
`json` and a loop, and a query of `v3` against one of the similarity prior alone. After a change that is meant to move
them, `--write` commits the new ones to `ratios.json`.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import log
import loop
import selection
import step
import torch


RATIOS = Path(__file__).with_name("ratios.json")
ALLOWED = 0.7  # of the committed ratio
SIZES = ["-G", "5", "16", "-S", "2", "4", "-K", "64", "--repeats", "3"]
QUICK = {
    "step": (step, SIZES),
    "loop": (loop, ["--groups", "1024", "--repeats", "2"]),
    "log": (log, ["--sizes", "16000", "--fewer", "4", "--repeats", "2", "--speed-only"]),
}
SELECTIONS = 30


def measure() -> dict[str, float]:
    """Median ratios by benchmark and name."""
    found = {}
    for name, (benchmark, arguments) in QUICK.items():
        report = benchmark.run(benchmark.parse(arguments))
        for target, row in report["targets"].items():
            if ">=" in row["target"]:
                found[f"{name}: {target}"] = row["median"]
    vectors = selection.vectors_of(selection.POOL)
    sides = {name: selection.selector_of(vectors, selection.SIDES[name]) for name in ("v3", "prior alone")}
    times = {name: row["1"]["median"] for name, row in selection.times_of(sides, SELECTIONS).items()}
    found["selection: prior alone over v3, one query"] = times["prior alone"] / times["v3"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"commit what is measured to {RATIOS.name}")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    found = measure()
    if args.write:
        RATIOS.write_text(json.dumps(found, indent=2) + "\n")
    fell = 0
    for name, before in json.loads(RATIOS.read_text()).items():
        worse = name not in found or found[name] < ALLOWED * before
        fell += worse
        print(f"{name}: {found.get(name, float('nan')):.2f}, committed {before:.2f}{'  FELL' if worse else ''}")
    print(f"{time.perf_counter() - start:.0f} s")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
