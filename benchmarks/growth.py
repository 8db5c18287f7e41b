"""
How the step grows: time and memory of a GRPO step against each size, and the exponent that fits.

One size at a time grows, the others stay at their defaults (B 32, G 5, S 2, K 64, D 768). Time is the median of
forward and backward of `step.py`'s shared side; memory is what the forward keeps for the backward, storage by storage,
so it has no noise. Then an epoch of `trainer.train()` against the number of groups in the log; memory is by how much
the process's own has grown at its end. The exponent p of `time ~ size^p` is that between the two largest values:
below, the cost of the other sizes hides it.

    python benchmarks/growth.py [--quick] [--output growth.json] [--plot growth.png]
"""

import argparse
import math
import tempfile
from pathlib import Path

import psutil
import torch
from _timing import finish, machine, seconds, spread
from loop import load_data, make_config, make_data, make_selector
from step import Step
from step import parse as step_arguments
from transformers import PrinterCallback

from lever_grpo import GroupBeamGRPOTrainer


DEFAULTS = {"B": 32, "G": 5, "S": 2, "K": 64, "D": 768}
SIZES = {
    "B": [8, 16, 32, 64, 128],
    "G": [1, 4, 16, 64, 128],
    "S": [1, 2, 4, 8],
    "K": [16, 32, 64, 128, 256, 512],
    "D": [192, 384, 768, 1536],
}
WHY = {
    "B": "every query brings a pool to project",
    "G": "a sequence costs state updates and K logits a step, not a pool",
    "S": "a pick costs one state update and K logits for each sequence",
    "K": "every candidate is projected, and scored by each sequence and step",
    "D": "only the first projection sees the width of the embeddings",
    "groups": "each is read once an epoch; logs and embeddings are mapped, not loaded",
}
GROUPS = [1024, 2048, 4096, 8192]


def step_of(device: str, sizes: dict[str, int]) -> Step:
    args = step_arguments(["-B", str(sizes["B"]), "-D", str(sizes["D"]), "--device", device])
    return Step(args, sizes["G"], sizes["S"], sizes["K"])


def kept_bytes(step: Step) -> int:
    """Bytes that the forward keeps for the backward, the weights and the batch itself left out."""
    given = {p.untyped_storage().data_ptr() for p in (*step.model.parameters(), *step.inputs.values())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def epoch_of(folder: Path) -> tuple[float, int]:
    """Seconds of an epoch of training over a log, and the bytes by which the process's own memory has grown."""
    dataset, collator = load_data(folder)
    trainer = GroupBeamGRPOTrainer(make_selector(), make_config(folder), collator, dataset)
    trainer.remove_callback(PrinterCallback)
    process = psutil.Process()
    before = process.memory_full_info().uss
    elapsed = seconds(trainer.train, "cpu")
    return elapsed, process.memory_full_info().uss - before


def epochs_of(turns: int) -> list[list[tuple[float, int]]]:
    """`epoch_of` each number of groups, turn by turn."""
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, str(groups)) for groups in GROUPS]
        for folder, groups in zip(folders, GROUPS, strict=True):
            folder.mkdir()
            make_data(folder, groups)
        epoch_of(folders[0])  # what the first training loads stays in memory
        return [[epoch_of(folder) for folder in folders] for _ in range(turns)]


def exponent(sizes: list[int], values: list[float]) -> float:
    """p of `value ~ size^p` between the two largest sizes."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


def run(args: argparse.Namespace) -> dict:
    """Measures all sizes and returns the report."""
    rows = {}
    for name, sizes in SIZES.items():
        steps = [step_of(args.device, {**DEFAULTS, name: size}) for size in sizes]
        times: list[list[float]] = [[] for _ in steps]
        for turn in range(args.repeats + 1):
            for taken, step in zip(times, steps, strict=True):
                elapsed = seconds(step, args.device)
                if turn:  # the first turn is the warm-up
                    taken.append(elapsed)
        memory = [kept_bytes(step) for step in steps]
        rows[name] = {
            "sizes": sizes,
            "seconds": [spread(taken) for taken in times],
            "kept_bytes": memory,
            "time_exponent": exponent(sizes, [spread(taken)["median"] for taken in times]),
            "memory_exponent": exponent(sizes, [float(value) for value in memory]),
            "why": WHY[name],
        }
    taken = epochs_of(1 if args.quick else 3)
    epochs = [spread([turn[i][0] for turn in taken]) for i in range(len(GROUPS))]
    rows["groups"] = {
        "sizes": GROUPS,
        "seconds": epochs,
        "kept_bytes": [max(0, min(turn[i][1] for turn in taken)) for i in range(len(GROUPS))],
        "time_exponent": exponent(GROUPS, [epoch["median"] for epoch in epochs]),
        "memory_exponent": None,
        "why": WHY["groups"],
    }
    return {"machine": machine(args.device), "defaults": DEFAULTS, "repeats": args.repeats, "rows": rows}


def plot(report: dict, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    figure, axes = plt.subplots(1, len(report["rows"]), figsize=(3 * len(report["rows"]), 3), layout="constrained")
    for axis, (name, row) in zip(axes, report["rows"].items(), strict=True):
        axis.loglog(row["sizes"], [1e3 * value["median"] for value in row["seconds"]], "o-", label="time, ms")
        if row["memory_exponent"] is not None:
            axis.loglog(row["sizes"], [value / 2**20 for value in row["kept_bytes"]], "s--", label="kept, MiB")
        axis.set(xlabel=name, title=f"time ~ {name}^{row['time_exponent']:.2f}")
        # numbers where less than a decade has no power of ten to show
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.6)))
        axis.set_xticks(row["sizes"], [str(size) for size in row["sizes"]])
        axis.xaxis.minorticks_off()
    axes[0].legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="2 turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="PNG file to write")
    args = parser.parse_args(arguments)
    args.repeats = 2 if args.quick else args.repeats
    report = run(args)
    print(f"{report['machine']}\nothers at {report['defaults']}, {report['repeats']} turns; median\n")
    for name, row in report["rows"].items():
        cells = [
            f"{size}: {1e3 * taken['median']:.0f} ms, {kept / 2**20:.1f} MiB"
            for size, taken, kept in zip(row["sizes"], row["seconds"], row["kept_bytes"], strict=True)
        ]
        print(f"{name}: " + "; ".join(cells))
        if row["memory_exponent"] is None:
            more = (row["kept_bytes"][-1] - row["kept_bytes"][0]) / (row["sizes"][-1] - row["sizes"][0])
            memory = f"+ {more:.0f} bytes each"
        else:
            memory = f"~ {name}^{row['memory_exponent']:.2f}"
        print(f"   time ~ {name}^{row['time_exponent']:.2f}, memory {memory}: {row['why']}")
    finish(report, args.output)
    if args.plot:
        plot(report, args.plot)


if __name__ == "__main__":
    main()
