"""
Groups per second of two processes on two cores, against one process with one thread.

Both run `GroupBeamGRPOTrainer.train()` over the same log at the same global batch: one process with B queries a step,
or two under `torchrun` (gloo) with B / 2 each. That the losses are the same is checked. Sides are timed in turns, each
in fresh processes; what is timed are the steps behind the first, start-up not.

    python benchmarks/processes.py [--quick] [--output processes.json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from _timing import finish, machine, spread, text


TARGET = 1.6
WORKER = "--worker"


def work(folder: Path, groups: int, batch: int) -> None:
    """One process of a side: trains an epoch; the first writes the seconds of a step and the losses."""
    torch.set_num_threads(1)
    from loop import BETA, load_data, make_selector
    from transformers import TrainerCallback

    from lever_grpo import GroupBeamGRPOConfig, GroupBeamGRPOTrainer

    world = int(os.environ.get("WORLD_SIZE", "1"))
    dataset, collator = load_data(folder)
    config = GroupBeamGRPOConfig(
        output_dir=str(folder / f"out-{world}"),
        per_device_train_batch_size=batch // world,
        rce_epochs=0,
        grpo_epochs=1,
        curriculum_epochs=0,
        beta=BETA,
        logging_steps=1,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = GroupBeamGRPOTrainer(make_selector(), args=config, data_collator=collator, train_dataset=dataset)
    assert trainer.accelerator.num_processes == world
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        result = {"seconds": (ends[-1] - ends[0]) / (len(ends) - 1), "losses": losses}
        (folder / f"result-{world}.json").write_text(json.dumps(result))
    trainer.accelerator.end_training()


def run(args: argparse.Namespace) -> dict:
    """Times both sides in turns and returns the report."""
    from loop import make_data

    times: dict[int, list[float]] = {1: [], 2: []}
    losses = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, args.groups)
        script = [__file__, WORKER, name, "--groups", str(args.groups), "--batch", str(args.batch)]
        starts = {1: [sys.executable], 2: [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]}
        for _ in range(args.repeats):
            for world, start in starts.items():
                done = subprocess.run([*start, *script], env=environment, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(f"the side with {world} processes failed:\n{done.stderr[-3000:]}")
                result = json.loads((folder / f"result-{world}.json").read_text())
                times[world].append(result["seconds"])
                losses[world] = result["losses"]
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[1]), atol=1e-4, rtol=1e-3)
    ratios = spread([one / two for one, two in zip(times[1], times[2], strict=True)])
    return {
        "machine": machine("cpu"),
        "groups": args.groups,
        "batch": args.batch,
        "repeats": args.repeats,
        "groups_per_second": {str(w): spread([args.batch / t for t in taken]) for w, taken in times.items()},
        "targets": {"two processes over one": {**ratios, "target": f">= {TARGET}", "met": ratios["median"] >= TARGET}},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=4096, help="groups of the log (default %(default)s)")
    parser.add_argument("-B", "--batch", type=int, default=256, help="queries of a step, in all (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="turns (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="512 groups, 1 turn")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument(WORKER, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.batch < 2 or args.batch % 2:
        parser.error(f"--batch is {args.batch}: two processes share it, so it must be even")
    if args.worker:
        return work(args.worker, args.groups, args.batch)
    if args.quick:
        args.groups, args.repeats = 512, 1
    report = run(args)
    print(f"{report['machine']}\n{args.groups} groups, {args.batch} a step, {args.repeats} turns; median [min, max]\n")
    for world, row in report["groups_per_second"].items():
        print(f"{world} process(es): {text(row, digits=0)} groups/s")
    finish(report, args.output)


if __name__ == "__main__":
    main()
