"""
Fails when a ratio fell by more than 30 % below the committed one: `make bench-quick`, a minute on an idle machine.

Only ratios of two sides that are timed in turns are compared, as milliseconds of another machine say nothing. After a
change that is meant to move them, `--write` commits the new ones to `ratios.json`.
"""

import argparse
import json
import sys
from pathlib import Path

import log
import loop
import step
import torch


RATIOS = Path(__file__).with_name("ratios.json")
ALLOWED = 0.7  # of the committed ratio
QUICK = {"step": (step, ["--quick", "-G", "5"]), "loop": (loop, ["--quick"]), "log": (log, ["--quick"])}


def measure() -> dict[str, float]:
    """Median ratios by benchmark and name."""
    found = {}
    for name, (benchmark, arguments) in QUICK.items():
        report = benchmark.run(benchmark.parse(arguments))
        for target, row in report["targets"].items():
            if ">=" in row["target"] and "epoch" not in target:  # an epoch of a small log is noise
                found[f"{name}: {target}"] = row["median"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"commit what is measured to {RATIOS.name}")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found = measure()
    if args.write:
        RATIOS.write_text(json.dumps(found, indent=2) + "\n")
    fell = 0
    for name, before in json.loads(RATIOS.read_text()).items():
        worse = name not in found or found[name] < ALLOWED * before
        fell += worse
        print(f"{name}: {found.get(name, float('nan')):.2f}, committed {before:.2f}{'  FELL' if worse else ''}")
    return 1 if fell else 0


if __name__ == "__main__":
    sys.exit(main())
