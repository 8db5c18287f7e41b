"""
Time that a selection takes once embeddings exist: milliseconds a query, alone and in a batch.

Each side is a `DemonstrationSelector`, asked for two demonstrations for queries whose embeddings are given: retrieval
of the pool, the network, the prompt order. One query at a time is what a service does, 64 what an evaluation does.

    python benchmarks/selection.py [--candidates 64] [--repeats 50] [--output selection.json]
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from _timing import machine, seconds, spread

from lever_grpo import DemonstrationSelector, PointerSelector, PointerSelectorConfig
from lever_grpo.data import EmbeddingStore, Example


TARGET = 2.0  # milliseconds a query, alone
WIDTH = 768
SIDES = {
    "v3": {},
    "v3 with the similarity prior": {"similarity_prior": True},
    "prior alone": {"encoder": "none", "similarity_prior": True},
}


def selector_of(candidates: int, options: dict) -> DemonstrationSelector:
    torch.manual_seed(0)
    config = PointerSelectorConfig.from_preset("v3", embed_dim=WIDTH, **options)
    selector = DemonstrationSelector(PointerSelector(config))
    vectors = np.random.default_rng(0).standard_normal((candidates, WIDTH)).astype(np.float32)
    rows = [Example(i, f"{i}?", ("a",)) for i in range(candidates)]
    selector.set_candidates(rows, EmbeddingStore({"embedding": vectors}))
    return selector


def run(args: argparse.Namespace) -> dict:
    """Times all sides in turns and returns the report."""
    selectors = {name: selector_of(args.candidates, options) for name, options in SIDES.items()}
    rng = np.random.default_rng(1)
    times: dict[str, dict[int, list[float]]] = {name: {1: [], 64: []} for name in SIDES}
    for turn in range(args.repeats + 3):
        for name, selector in selectors.items():
            for count in (1, 64):
                queries = [Example(10**6 + i, "?", ("?",)) for i in range(count)]
                vectors = EmbeddingStore({"embedding": rng.standard_normal((count, WIDTH)).astype(np.float32)})
                taken = seconds(lambda s=selector, q=queries, v=vectors: s.select(q, embeddings=v), "cpu")
                if turn >= 3:  # the first turns are the warm-up
                    times[name][count].append(1000 * taken / count)
    rows = {name: {str(count): spread(values) for count, values in sides.items()} for name, sides in times.items()}
    return {
        "machine": machine("cpu"),
        "candidates": args.candidates,
        "width": WIDTH,
        "milliseconds_per_query": rows,
        "targets": {
            f"{name}, one query": {**row["1"], "target": f"< {TARGET} ms", "met": row["1"]["median"] < TARGET}
            for name, row in rows.items()
        },
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--candidates", type=int, default=64, help="candidates; pools are the nearest 64 (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=50, help="timed turns (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    for name in ("candidates", "repeats"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 2")
    args.repeats = 3 if args.quick else args.repeats
    report = run(args)
    print(f"{report['machine']}\nK = {args.candidates}, width {WIDTH}; milliseconds a query, median [min, max]\n")
    for name, row in report["milliseconds_per_query"].items():
        cells = [f"{v['median']:.2f} [{v['min']:.2f}, {v['max']:.2f}]" for v in row.values()]
        print(f"{name:>30}  alone {cells[0]:>22}   64 at a time {cells[1]:>22}")
    for name, row in report["targets"].items():
        print(f"{name}: {row['median']:.2f} ms, target {row['target']}: {'met' if row['met'] else 'MISSED'}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
