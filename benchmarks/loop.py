"""
Groups per second of `trainer.train()`, against a bare loop of the same step on the same batches.

Both sides train the same selector from the same weights on the same batches in the same order: forward, the KL to the
reference, the clipped policy loss, backward, gradient clipping, AdamW. The bare loop has its batches ready in memory,
and nothing else; the trainer reads rows of a log, gathers their embeddings from a memory map, computes the metrics,
logs them, moves the schedules. The same losses on both sides are checked first; then they are timed in turns.

    python benchmarks/loop.py [--quick] [--output loop.json]
"""

import argparse
import copy
import gc
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orjson
import torch
from _timing import finish, machine, spread, text
from datasets import Dataset
from transformers import PrinterCallback

from lever_grpo import GroupBeamGRPOConfig, GroupBeamGRPOTrainer, PointerSelector, PointerSelectorConfig, load_beams
from lever_grpo.data import DataCollatorForBeams, EmbeddingStore
from lever_grpo.objectives import exact_kl, group_advantages, group_policy_loss


TARGET = 0.85  # of the bare loop's groups per second
BETA = 0.04
WIDTH = 768
LOGGING_STEPS = 10


def make_data(folder: Path, groups: int, beams: int = 5, shots: int = 2, pool: int = 64, width: int = WIDTH) -> None:
    """A log of random scores (format 4) and the embeddings of its rows."""
    rng = np.random.default_rng(0)
    rows = 4 * pool + groups
    np.save(folder / "embedding.npy", rng.standard_normal((rows, width)).astype(np.float16))
    with (folder / "log.jsonl").open("wb") as stream:
        for query in range(4 * pool, rows):
            candidates = rng.choice(4 * pool, pool, replace=False)
            chosen = [rng.choice(candidates, shots, replace=False).tolist() for _ in range(beams)]
            record = {
                "query_id": query,
                "pool": candidates.tolist(),
                "sequences": [{"prompt_order": ids, "score": rng.standard_normal()} for ids in chosen],
            }
            stream.write(orjson.dumps(record) + b"\n")


def load_data(folder: Path) -> tuple[Dataset, DataCollatorForBeams]:
    """What `make_data` wrote."""
    store = EmbeddingStore.open({"embedding": folder / "embedding.npy"})
    groups = load_beams(folder / "log.jsonl", cache_dir=folder / "cache")
    return groups, DataCollatorForBeams(store, ["embedding"], ["embedding"])


def make_selector(width: int = WIDTH, hidden_dim: int = 256) -> PointerSelector:
    torch.manual_seed(0)
    config = PointerSelectorConfig.from_preset("v3", embed_dim=width, hidden_dim=hidden_dim, dropout=0.0)
    return PointerSelector(config)


def make_config(folder: Path, batch: int = 32, workers: int = 0, device: str = "cpu") -> GroupBeamGRPOConfig:
    """An epoch of GRPO on whole groups, and nothing beside it."""
    return GroupBeamGRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=batch,
        rce_epochs=0,
        grpo_epochs=1,
        curriculum_epochs=0,
        old_policy_refresh="steps",
        old_policy_refresh_steps=1,
        beta=BETA,
        adaptive_beta=False,
        dataloader_num_workers=workers,
        logging_steps=LOGGING_STEPS,
        eval_strategy="no",
        save_strategy="no",
        load_best_model_at_end=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )


class Sides:
    """The two loops over one log."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        make_data(folder, args.groups, args.beams, args.shots, args.pool, args.embed_dim)
        self.dataset, self.collator = load_data(folder)
        self.start = make_selector(args.embed_dim, args.hidden_dim)
        self.config = make_config(folder, args.batch, args.workers, args.device)
        self.batches = [
            {name: self._to(value, args.device) for name, value in batch.items()}
            for batch in self.trainer().get_train_dataloader()
        ]

    def _to(self, value, device):
        return {k: v.to(device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)

    def trainer(self) -> GroupBeamGRPOTrainer:
        trainer = GroupBeamGRPOTrainer(
            copy.deepcopy(self.start), args=self.config, data_collator=self.collator, train_dataset=self.dataset
        )
        trainer.remove_callback(PrinterCallback)  # what it prints is not the loop's
        return trainer

    def with_trainer(self) -> tuple[float, float]:
        """Seconds of `train()`, and the loss of its last log."""
        trainer = self.trainer()
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start, trainer.state.log_history[-2]["loss"]

    def bare(self) -> tuple[float, float]:
        """Seconds of the loop without a trainer, and the mean loss of the steps of that log."""
        trainer = self.trainer()
        args, model = self.config, trainer.model.train()
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        optimizer = trainer.create_optimizer()
        schedule = trainer.create_scheduler(len(self.batches), optimizer)
        losses = []
        start = time.perf_counter()
        for batch in self.batches:
            inputs = {
                name: batch[name]
                for name in (
                    *("query_embeds", "candidate_embeds", "candidate_indices", "candidate_mask"),
                    *("sequences", "sequence_mask"),
                )
            }
            mask, beams = batch["sequence_mask"], batch["sequence_mask"].any(-1)
            with torch.no_grad():
                before = reference(**inputs, return_step_log_probs=True).step_log_probs
            output = model(**inputs, return_step_log_probs=True)
            advantages = group_advantages(
                batch["rewards"]["score"], beams, scale_rewards=args.scale_rewards, clip=args.advantage_clip
            )
            policy, _ = group_policy_loss(
                output.log_probs,
                None,
                advantages,
                mask,
                beams,
                loss_type=args.loss_type,
                importance_sampling_level=args.importance_sampling_level,
            )
            kl = exact_kl(output.step_log_probs, before, args.kl_direction, mask)
            loss = (policy + BETA * kl.sum((-1, -2)) / mask.sum((-1, -2))).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        taken = time.perf_counter() - start
        last = len(losses) // LOGGING_STEPS * LOGGING_STEPS  # what the trainer's last log is about
        return taken, torch.stack(losses[last - LOGGING_STEPS : last]).mean().item()


def run(args: argparse.Namespace) -> dict:
    """Times both sides in turns and returns the report."""
    logging.getLogger("lever_grpo").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(args, Path(folder))
        turns: dict[str, Callable[[], tuple[float, float]]] = {"bare": sides.bare, "trainer": sides.with_trainer}
        times: dict[str, list[float]] = {name: [] for name in turns}
        losses = {}
        for _ in range(args.repeats):
            for name, side in turns.items():
                gc.collect()  # what the turn before has left is not this one's
                taken, losses[name] = side()
                times[name].append(taken)
        torch.testing.assert_close(losses["trainer"], losses["bare"], atol=2e-4, rtol=1e-3)
    ratios = spread([bare / trainer for bare, trainer in zip(times["bare"], times["trainer"], strict=True)])
    sizes = ("groups", "batch", "beams", "shots", "pool", "embed_dim", "hidden_dim", "workers")
    return {
        "machine": machine(args.device),
        "sizes": {name: getattr(args, name) for name in sizes},
        "repeats": args.repeats,
        "groups_per_second": {name: spread([args.groups / t for t in taken]) for name, taken in times.items()},
        "targets": {"trainer over bare loop": {**ratios, "target": f">= {TARGET}", "met": ratios["median"] >= TARGET}},
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=8192, help="groups of the log (default %(default)s)")
    parser.add_argument("-B", "--batch", type=int, default=32, help="queries in a batch (default %(default)s)")
    parser.add_argument("-G", "--beams", type=int, default=5, help="sequences of a group (default %(default)s)")
    parser.add_argument("-S", "--shots", type=int, default=2, help="picks of a sequence (default %(default)s)")
    parser.add_argument("-K", "--pool", type=int, default=64, help="candidates of a pool (default %(default)s)")
    parser.add_argument("-D", "--embed-dim", type=int, default=WIDTH, help="embedding width (default %(default)s)")
    parser.add_argument("--hidden-dim", type=int, default=256, help="width of the network (default %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that collate (default %(default)s)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="(default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="320 groups, 3 turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.quick:
        args.groups, args.repeats = 320, 3
    if args.groups < 10 * args.batch:
        parser.error(f"--groups is {args.groups}: it must be at least ten batches of {args.batch}")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    report = run(args)
    print(f"{report['machine']}\n{report['sizes']}, {report['repeats']} turns; median [min, max]\n")
    for name, row in report["groups_per_second"].items():
        print(f"{name:>8}: {text(row, digits=0)} groups/s")
    finish(report, args.output)


if __name__ == "__main__":
    main()
