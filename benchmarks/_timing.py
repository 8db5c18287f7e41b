"""What the benchmarks share: the clock, the spread of a few measurements, and what machine it was."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def seconds(step: Callable, device: str) -> float:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(values: dict, scale: float = 1, digits: int = 2) -> str:
    """Median and range of a spread."""
    median, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{median} [{low}, {high}]"


def finish(report: dict, output: Path | None) -> None:
    """Prints what became of the targets, and writes the report."""
    for name, row in report.get("targets", {}).items():
        print(f"{name}: {text(row)}, target {row['target']}: {'met' if row['met'] else 'MISSED'}")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n")


def machine(device: str) -> dict[str, str | int]:
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "processor": processor,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": platform.system(),
    }
