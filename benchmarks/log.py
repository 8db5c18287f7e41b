"""
Speed and memory of reading a large beam log, and of an epoch over it.

Synthetic logs are written to a temporary folder, in three formats:

* lever_lm: one JSON object of records with `id_list`, `score_list`, `shot_scores` and `candidate_ids`;
* groups: JSON lines as the search writes them, with many sequences a query;
* scored: the same groups as JSON lines of objects, one a sequence.

Each measurement has a process of its own. `load_beams` (digest of the file, all checks, Arrow file on disk) is timed
in turns with what one would write without it: `json`, and a loop that maps ids to pool positions and adds up gains,
with no check, to lists in memory (loop), and these to a `Dataset` (loop + Dataset); both at the largest size in reach
alone. Targets are of processor time, which a busy machine spoils less than the clock's; the ratios by the clock are
printed beside them. Memory is the peak above that after the imports and a first small log.

Then an epoch over the largest log, with the batches of a trainer (`LazyDataset`, a shuffling `DataLoader`,
`DataCollatorForBeams`), and as many over the smallest as give the same number of groups: Python's garbage collector
runs every few thousand groups, so that a short run would be spared it. There memory is what is not backed by a file:
the Arrow file is mapped, and its pages come and go as the system likes.

    python benchmarks/log.py [--quick | --full] [--output log.json]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path


SPEED_TARGET = 3.0  # load_beams at least this many times as fast as json and a loop
MEMORY_TARGET = 1024  # MiB above the imports
EPOCH_TARGET = 0.95  # groups a second of the largest log over those of the smallest: equal, within the noise
FLAT_TARGET = 16  # MiB by which the peak of the largest log may be above that of the smallest
FORMATS = ("lever_lm", "groups", "scored")
FULL = 1_000_000


# ---------------------------------------------------------------- the logs


def write_log(path: Path, kind: str, count: int, args: argparse.Namespace) -> None:
    generator = random.Random(0)
    rows = max(count, 2 * args.pool)
    size = args.beams if kind == "lever_lm" else args.sequences
    with path.open("w") as stream:
        stream.write("{" if kind == "lever_lm" else "")
        for query in range(count):
            pool = [i for i in generator.sample(range(rows), args.pool + 1) if i != query][: args.pool]
            sequences: dict[tuple[int, ...], None] = {}
            while len(sequences) < size:
                shots = args.shots if kind == "lever_lm" or generator.random() < 0.7 else 1
                sequences[tuple(generator.sample(range(args.pool), shots))] = None
            gains = [[generator.gauss(0, 0.05) for _ in sequence] for sequence in sequences]
            record = RECORD[kind](query, pool, list(sequences), gains)
            text = json.dumps(record)
            stream.write(f'{", " if query else ""}"{query}": {text}' if kind == "lever_lm" else text + "\n")
        stream.write("}" if kind == "lever_lm" else "")


def lever_lm_record(query, pool, sequences, gains):
    return {
        "id_list": [[pool[p] for p in reversed(sequence)] + [query] for sequence in sequences],
        "score_list": [shots[-1] for shots in gains],
        "shot_scores": gains,
        "candidate_ids": pool,
    }


def groups_record(query, pool, sequences, gains):
    return {
        "query_id": query,
        "candidate_ids": pool,
        "sequences": sequences,
        "scores": list(map(sum, gains)),
        "shot_scores": gains,
        "survived": [i < 5 for i in range(len(sequences))],
        "zero_shot": -2.5,
        "source": ["search"] * len(sequences),
        "columns": {"log_prob": [-2.5 + sum(shots) for shots in gains]},
        "notes": {"failed": 0},
    }


def scored_record(query, pool, sequences, gains):
    entries = [
        {"search_order": [pool[p] for p in sequence], "score": sum(shots), "shot_scores": shots, "beam": i < 5}
        for i, (sequence, shots) in enumerate(zip(sequences, gains, strict=True))
    ]
    return {"query_id": query, "candidate_ids": pool, "zero_shot": -2.5, "sequences": entries}


RECORD = {"lever_lm": lever_lm_record, "groups": groups_record, "scored": scored_record}


# ---------------------------------------------------------------- without load_beams


def loop(path: str, kind: str) -> list[dict]:
    """The groups of a log, as one would read them in twenty lines."""
    groups = []
    if kind == "lever_lm":
        with open(path) as stream:
            log = json.load(stream)
        for key, record in log.items():
            query, pool = int(key), record["candidate_ids"]
            position = {candidate: p for p, candidate in enumerate(pool)}
            sequences = []
            for beam in record["id_list"]:
                if beam[-1] != query:
                    raise ValueError(f"{key}: {beam}")
                sequences.append([position[i] for i in reversed(beam[:-1])])
            scores = [sum(shots) for shots in record["shot_scores"]]
            groups.append(_group(query, pool, sequences, scores, record["shot_scores"], [True] * len(scores)))
        return groups
    with open(path) as stream:
        for line in stream:
            record = json.loads(line)
            query, pool = record["query_id"], record["candidate_ids"]
            if kind == "groups":
                columns = [record[name] for name in ("sequences", "scores", "shot_scores", "survived")]
                group = _group(query, pool, *columns)
                group["columns"] = record["columns"]
            else:
                position = {candidate: p for p, candidate in enumerate(pool)}
                entries = record["sequences"]
                sequences = [[position[i] for i in entry["search_order"]] for entry in entries]
                columns = [[entry[name] for entry in entries] for name in ("score", "shot_scores", "beam")]
                group = _group(query, pool, sequences, *columns)
            group["zero_shot"] = record["zero_shot"]
            groups.append(group)
    return groups


def _group(query, pool, sequences, scores, shot_scores, survived) -> dict:
    return {
        "query_id": query,
        "candidate_ids": pool,
        "sequences": sequences,
        "scores": scores,
        "shot_scores": shot_scores,
        "survived": survived,
    }


# ---------------------------------------------------------------- one measurement, in a process of its own


def memory(field: str) -> float:
    """A field of `/proc/self/status` in MiB; elsewhere the peak, whichever is asked for."""
    status = Path("/proc/self/status")
    if status.exists():
        [line] = [line for line in status.read_text().splitlines() if line.startswith(field + ":")]
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def measure(side: str, path: str, kind: str, cache: str, small: str) -> dict:
    def convert(path, cache):
        from lever_grpo.data import load_beams

        return load_beams(path, cache_dir=cache)

    def to_dataset(path, cache):
        from datasets import Dataset

        return Dataset.from_list(loop(path, kind))

    run = {"load_beams": convert, "loop": lambda path, cache: loop(path, kind), "loop + Dataset": to_dataset}[side]
    with tempfile.TemporaryDirectory() as folder:
        run(small, folder)  # what is imported and allocated only once
    before = memory("VmRSS")
    start, clock = time.process_time(), time.perf_counter()
    groups = run(path, cache)
    seconds, wall = time.process_time() - start, time.perf_counter() - clock
    return {"seconds": seconds, "wall": wall, "peak": memory("VmHWM") - before, "groups": len(groups)}


def measure_epoch(path: str, cache: str, rows: int, batch: int, count: int) -> dict:
    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from lever_grpo.data import DataCollatorForBeams, EmbeddingStore, load_beams
    from lever_grpo.data.collator import LazyDataset

    torch.set_num_threads(1)
    groups = load_beams(path, cache_dir=cache)
    store = EmbeddingStore({"text": np.zeros((rows, 16), dtype=np.float16)})
    collate = DataCollatorForBeams(store, ["text"], ["text"])
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(LazyDataset(groups), batch, shuffle=True, collate_fn=collate, generator=generator)
    next(iter(loader))
    before = highest = memory("RssAnon")
    start, clock = time.process_time(), time.perf_counter()
    seen = 0
    while seen < count:
        for step, _ in enumerate(loader):
            if step % 16 == 0:
                highest = max(highest, memory("RssAnon"))
        seen += len(groups)
    seconds, wall = time.process_time() - start, time.perf_counter() - clock
    return {"seconds": seconds, "wall": wall, "peak": highest - before, "groups": seen}


def child(function: str, *arguments: str | int) -> dict:
    """Runs `measure` or `measure_epoch` in a new process."""
    code = f"import json, log; print(json.dumps(log.{function}(*{arguments!r})))"
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    folder = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- all of them


def run(args: argparse.Namespace) -> dict:
    from _timing import machine, spread

    names = ("formats", "sizes", "beams", "sequences", "shots", "pool", "batch", "repeats")
    report: dict = {"machine": machine("cpu"), "options": {name: getattr(args, name) for name in names}}
    report |= {"formats": {}, "targets": {}}

    def target(name: str, value: dict, text: str, met: bool, clock: dict | None = None) -> None:
        report["targets"][name] = {**value, "target": text, "met": met} | ({"clock": clock} if clock else {})

    for kind in args.formats:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            sizes = [size if kind == "lever_lm" else max(1, size // args.fewer) for size in args.sizes]
            paths = {size: Path(folder, f"{size}.log") for size in sizes}
            small = Path(folder, "small.log")
            for size, path in {64: small, **paths}.items():
                write_log(path, kind, size, args)
            rows = report["formats"][kind] = {}
            looped = max(size for size in sizes if size <= args.loop_up_to)
            for size, path in paths.items():
                sides: dict[str, list[dict]] = {"load_beams": [], "loop": []}
                if not args.speed_only:
                    sides["loop + Dataset"] = []
                for _ in range(args.repeats):
                    for side, found in sides.items():
                        if side != "load_beams" and size != looped:
                            continue  # a larger one would take all memory
                        with tempfile.TemporaryDirectory(dir=folder) as cache:
                            found.append(child("measure", side, str(path), kind, cache, str(small)))
                row = rows[str(size)] = {"file_mib": path.stat().st_size / 2**20}
                for side, found in sides.items():
                    if found:
                        row[side] = {
                            name: spread([one[name] for one in found]) for name in ("seconds", "wall", "peak")
                        }
                for side in ("loop", "loop + Dataset"):
                    if sides.get(side):
                        pairs = list(zip(sides[side], sides["load_beams"], strict=True))
                        row[f"speed-up over {side}"] = {
                            name: spread([a[name] / b[name] for a, b in pairs]) for name in ("seconds", "wall")
                        }
            found = rows[str(looped)]["speed-up over loop"]
            value = found["seconds"]
            met = value["median"] >= SPEED_TARGET
            target(f"{kind}: speed-up over loop", value, f">= {SPEED_TARGET}", met, found["wall"])
            if args.speed_only:
                continue
            smallest, value = (rows[str(size)]["load_beams"]["peak"] for size in (sizes[0], sizes[-1]))
            target(f"{kind}: peak memory, MiB", value, f"< {MEMORY_TARGET}", value["max"] < MEMORY_TARGET)
            more = {name: value[name] - smallest["median"] for name in value}
            target(
                f"{kind}: peak above the smallest log's, MiB", more, f"< {FLAT_TARGET}", more["median"] < FLAT_TARGET
            )

            epochs: dict[int, list[dict]] = {sizes[0]: [], sizes[-1]: []}
            caches = {size: str(Path(folder, f"cache-{size}")) for size in epochs}
            for _ in range(args.repeats):
                for size, found in epochs.items():
                    needed = max(sizes[-1], 2 * args.pool) + 1
                    found.append(child("measure_epoch", str(paths[size]), caches[size], needed, args.batch, sizes[-1]))
            for size, found in epochs.items():
                rows[str(size)]["epoch"] = {
                    "groups_per_second": spread([one["groups"] / one["seconds"] for one in found]),
                    "by_the_clock": spread([one["groups"] / one["wall"] for one in found]),
                    "peak": spread([one["peak"] for one in found]),
                }
            pairs = list(zip(epochs[sizes[0]], epochs[sizes[-1]], strict=True))
            value, clock = (
                spread([b["groups"] / b[name] / (a["groups"] / a[name]) for a, b in pairs])
                for name in ("seconds", "wall")
            )
            met = value["median"] >= EPOCH_TARGET
            target(f"{kind}: epoch, largest / smallest", value, f">= {EPOCH_TARGET}", met, clock)
    return report


def show(report: dict) -> None:
    from _timing import text

    print(f"{report['machine']}\n{report['options']}\nprocessor time, median [min, max]")

    for kind, rows in report["formats"].items():
        print(f"\n{kind:<9} {'MiB':>7}  {'side':<14}  {'µs a group':>24}  {'peak MiB':>24}  {'speed-up':>20}")
        for size, row in rows.items():
            for side in ("load_beams", "loop", "loop + Dataset"):
                if side in row:
                    ratio = row.get(f"speed-up over {side}")
                    print(
                        f"{size:>9} {row['file_mib']:>7.1f}  {side:<14}  "
                        f"{text(row[side]['seconds'], 1e6 / int(size), 1):>24}  {text(row[side]['peak'], 1, 1):>24}  "
                        f"{text(ratio['seconds']) if ratio else '':>20}"
                    )
        for size, row in rows.items():
            if "epoch" in row:
                speed, peak = row["epoch"]["groups_per_second"], row["epoch"]["peak"]
                print(f"{size:>9} epoch: {text(speed, 1, 0)} groups a second, peak {text(peak, 1, 1)} MiB")
    print("\nby the clock:")
    for name, row in report["targets"].items():
        if "clock" in row:
            print(f"{name}: {text(row['clock'])}")
    print()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["lever_lm", "groups"], help="logs to write")
    parser.add_argument("-N", "--sizes", type=int, nargs="+", default=[5_000, 40_000], help="groups of a lever_lm log")
    parser.add_argument(
        "--fewer", type=int, default=8, help="logs of other formats have fewer groups by this (default %(default)s)"
    )
    parser.add_argument("--beams", type=int, default=5, help="sequences of a lever_lm group (default %(default)s)")
    parser.add_argument("-G", "--sequences", type=int, default=64, help="those of the others (default %(default)s)")
    parser.add_argument("-S", "--shots", type=int, default=2, help="picks of a sequence (default %(default)s)")
    parser.add_argument("-K", "--pool", type=int, default=64, help="candidates of a pool (default %(default)s)")
    parser.add_argument("-B", "--batch", type=int, default=32, help="groups in a batch (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default %(default)s)")
    parser.add_argument(
        "--loop-up-to", type=int, default=100_000, help="largest log for the loop in memory (default %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="where the logs are written, instead of the temporary folder")
    parser.add_argument("--quick", action="store_true", help="one turn of 1,000 and 4,000 groups")
    parser.add_argument("--speed-only", action="store_true", help="load_beams against the loop, and no more")
    parser.add_argument(
        "--full", action="store_true", help="one turn of 100,000 and a million groups of each format (25 GiB of disk)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.quick:
        args.sizes, args.repeats = [1_000, 4_000], 1
    if args.full:
        args.sizes, args.repeats, args.fewer = [FULL // 10, FULL], 1, 1
    for name in ("fewer", "beams", "sequences", "shots", "pool", "batch", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if min(args.sizes) < 1 or args.sizes != sorted(args.sizes):
        parser.error(f"--sizes is {args.sizes}: they must be at least 1, and ascend")
    if args.shots > args.pool or args.beams > args.pool or args.sequences > args.pool**args.shots // 2:
        parser.error(f"--pool is {args.pool}: too small for that many different sequences; raise it")
    if args.sizes[0] > args.loop_up_to:
        parser.error(f"--loop-up-to is {args.loop_up_to}: the smallest log, of {args.sizes[0]}, must be in reach")
    return args


def main(arguments: list[str] | None = None) -> None:
    from _timing import finish

    args = parse(arguments)
    report = run(args)
    show(report)
    finish(report, args.output)


if __name__ == "__main__":
    main()
