"""
Time that a selection takes once embeddings exist: milliseconds a query, alone and in a batch.

Each side is a `DemonstrationSelector`, asked for two demonstrations for queries whose embeddings are given: retrieval
of the pool, the network, the prompt order. One query at a time is what a service does, 64 what an evaluation does.
First all sides in turns on `--candidates`; then, one side after the other, in float32 and bfloat16 on 64 to 100,000
candidates, of which the nearest 64 are each query's pool, with what retrieval alone takes.

    python benchmarks/selection.py [--candidates 64] [--repeats 50] [--output selection.json]
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import finish, machine, seconds, spread

from lever_grpo import DemonstrationSelector, PointerSelector, PointerSelectorConfig
from lever_grpo.data import EmbeddingStore, Example
from lever_grpo.search.samplers import PoolSampler


TARGET = 2.0  # milliseconds a query, alone
WIDTH = 768
POOL = 64
CALLS = {1: 4, 64: 1}  # queries at a time: calls of a turn, one after the other as a service has them
SIZES = (64, 1_000, 10_000, 100_000)
SIDES = {
    "v3": {},
    "v3 with the similarity prior": {"similarity_prior": True},
    "prior alone": {"encoder": "none", "similarity_prior": True},
}
Side = Callable[[np.ndarray], object]  # what is done with the embeddings of queries


def vectors_of(candidates: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((candidates, WIDTH), dtype=np.float32)


def selector_of(vectors: np.ndarray, options: dict, dtype: torch.dtype = torch.float32) -> Side:
    torch.manual_seed(0)
    config = PointerSelectorConfig.from_preset("v3", embed_dim=WIDTH, **options)
    selector = DemonstrationSelector(PointerSelector(config).to(dtype))
    rows = [Example(i, f"{i}?", ("a",)) for i in range(len(vectors))]
    selector.set_candidates(rows, EmbeddingStore({"embedding": vectors}))

    def select(embeds: np.ndarray) -> object:
        queries = [Example(10**6 + i, "?", ("?",)) for i in range(len(embeds))]
        return selector.select(queries, pool_size=POOL, embeddings=EmbeddingStore({"embedding": embeds}))

    return select


def retrieval_of(vectors: np.ndarray) -> Side:
    sampler = PoolSampler(range(len(vectors)), text=vectors)
    return lambda embeds: sampler.pools("text_sim", range(10**6, 10**6 + len(embeds)), POOL, text=embeds)


def times_of(sides: dict[str, Side], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Milliseconds a query of each side, in turns, by the number of queries at a time."""
    rng = np.random.default_rng(1)
    times: dict[str, dict[int, list[float]]] = {name: {count: [] for count in CALLS} for name in sides}
    for turn in range(repeats + 3):
        for name, side in sides.items():
            for count in [count for count, calls in CALLS.items() for _ in range(calls)]:
                embeds = rng.standard_normal((count, WIDTH), dtype=np.float32)
                taken = seconds(lambda side=side, embeds=embeds: side(embeds), "cpu")
                if turn >= 3:  # the first turns are the warm-up
                    times[name][count].append(1000 * taken / count)
    return {name: {str(count): spread(found) for count, found in by.items()} for name, by in times.items()}


def growth(repeats: int, sizes: tuple[int, ...]) -> list[dict]:
    """Each side in float32 and bfloat16 on more and more candidates."""
    found = []
    for size in sizes:
        vectors = vectors_of(size)
        rows: list[tuple[str, torch.dtype, Callable[[], Side]]] = [
            ("retrieval alone", torch.float32, lambda v=vectors: retrieval_of(v))
        ]
        for name, options in SIDES.items():
            for dtype in (torch.float32, torch.bfloat16):
                rows.append((name, dtype, lambda v=vectors, o=options, d=dtype: selector_of(v, o, d)))
        for name, dtype, make in rows:  # one at a time: each keeps what it computes of the candidates
            found.append(
                {
                    "candidates": size,
                    "side": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "milliseconds_per_query": times_of({name: make()}, repeats)[name],
                }
            )
    return found


def run(args: argparse.Namespace) -> dict:
    """Times all sides and returns the report."""
    vectors = vectors_of(args.candidates)
    rows = times_of({name: selector_of(vectors, options) for name, options in SIDES.items()}, args.repeats)
    return {
        "machine": machine("cpu"),
        "candidates": args.candidates,
        "width": WIDTH,
        "milliseconds_per_query": rows,
        "growth": growth(min(args.repeats, 20), SIZES[:2] if args.quick else SIZES),
        "targets": {
            f"{name}, one query": {**row["1"], "target": f"< {TARGET} ms", "met": row["1"]["median"] < TARGET}
            for name, row in rows.items()
        },
    }


def cells(row: dict[str, dict[str, float]]) -> str:
    alone, many = (f"{v['median']:.2f} [{v['min']:.2f}, {v['max']:.2f}]" for v in row.values())
    return f"alone {alone:>24}   64 at a time {many:>22}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--candidates", type=int, default=64, help="candidates of the first part (default %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=50, help="timed turns (default %(default)s); in the second part 20 at most"
    )
    parser.add_argument(
        "--quick", action="store_true", help="3 turns, and at most 1,000 candidates in the second part"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    for name in ("candidates", "repeats"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} is {getattr(args, name)}: it must be at least 2")
    args.repeats = 3 if args.quick else args.repeats
    report = run(args)
    print(f"{report['machine']}\nK = {args.candidates}, width {WIDTH}; milliseconds a query, median [min, max]\n")
    for name, row in report["milliseconds_per_query"].items():
        print(f"{name:>30}  {cells(row)}")
    print(f"\nThe nearest {POOL} of more and more candidates")
    for row in report["growth"]:
        print(f"{row['candidates']:>7,} {row['side']:>29} {row['dtype']:>9}  {cells(row['milliseconds_per_query'])}")
    print()
    finish(report, args.output)


if __name__ == "__main__":
    main()
