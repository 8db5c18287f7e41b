"""
Time of one GRPO step: the pool encoded once per query, against the pool expanded per beam.

Both sides have the same weights, the same batch and the same loss (clipped policy loss + exact KL, forward and
backward):

* shared: B queries, pools (B, K, D), sequences (B, G, S);
* expanded: B·G queries, each with its own copy of its pool (B·G, K, D) and one sequence, and keys and values of the
  whole pool for the one token that attends to it: the step as it is usually written. The copies are made before the
  clock starts. At G 1 it differs from shared by the attention alone.

That losses and gradients are equal is checked first. Then the sides are timed in turns (A B A B …) in one process, and
ratios are taken within each turn. The floor is the time of the matrix products of the shared step alone, replayed.
`--compile` adds the shared step through `torch.compile`, `--bf16` the shared step under autocast.

    python benchmarks/step.py [-G 5 16] [-S 2 4] [-K 64 256] [--quick] [--output step.json]
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import finish, machine, seconds, spread, text
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.models.layers import Attention
from lever_grpo.objectives import exact_kl, group_advantages, group_policy_loss


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
SPEEDUP_TARGETS = {5: 5.0, 16: 18.0}  # by G: how many times as fast as expanded
GROWTH_TARGET = (1, 16, 2.0)  # shared: G 16 below twice the time of G 1
FLOOR_TARGET = 0.7  # of the step's time, that of its matrix products
BETA = 0.04


class ProductRecorder(TorchDispatchMode):
    """Keeps the matrix products that run inside it, to run them again alone."""

    def __init__(self):
        super().__init__()
        self.products: list[tuple[Callable, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS:
            self.products.append((func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        for func, args in self.products:
            func(*args)


class Projection(nn.Linear):
    """Keys and values of the whole context, as usual: the selector's shortcut is for plain `nn.Linear` alone."""


class Step:
    """Forward and backward of the GRPO loss on one random batch with groups of `group` beams."""

    def __init__(
        self, args: argparse.Namespace, group: int, shots: int, pool: int, expanded: bool = False, bf16: bool = False
    ):
        generator = torch.Generator().manual_seed(0)
        device = torch.device(args.device)
        batch, width = args.batch, args.embed_dim
        self.shape, self.autocast = (batch, group, shots), torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        torch.manual_seed(0)
        config = PointerSelectorConfig.from_preset("v3", embed_dim=width, hidden_dim=args.hidden_dim, dropout=0.0)
        self.model = PointerSelector(config).train().to(device)
        self.policy: Callable = self.model
        inputs = {
            "query_embeds": torch.randn(batch, width, generator=generator),
            "candidate_embeds": torch.randn(batch, pool, width, generator=generator),
            "sequences": torch.rand(batch, group, pool, generator=generator).argsort(-1)[..., :shots],
        }
        inputs = {name: x.to(device) for name, x in inputs.items()}
        self.advantages = group_advantages(torch.randn(batch, group, generator=generator)).to(device)  # (B, G)
        if group == 1:  # a group of one has no contrast; the work is the same
            self.advantages = torch.ones(batch, 1, device=device)
        self.mask = torch.ones(self.shape, dtype=torch.bool, device=device)
        # the reference and π_old: the policy's start, before it moved a little
        with torch.no_grad():
            start = self.model(**inputs, return_step_log_probs=True)
            self.old_log_probs, self.reference = start.log_probs, start.step_log_probs
            for parameter in self.model.parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(device)
                parameter.add_(0.1 * noise * parameter.abs().mean())
        if expanded:
            inputs = {
                "query_embeds": inputs["query_embeds"].repeat_interleave(group, dim=0),  # (B * G, D)
                "candidate_embeds": inputs["candidate_embeds"].repeat_interleave(group, dim=0),  # (B * G, K, D)
                "sequences": inputs["sequences"].flatten(0, 1).unsqueeze(1),  # (B * G, 1, S)
            }
            for module in self.model.modules():
                if isinstance(module, Attention):
                    module.k_proj.__class__ = module.v_proj.__class__ = Projection
        self.inputs = inputs

    def compiled(self) -> "Step":
        self.policy = torch.compile(self.model)
        return self

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        with self.autocast:
            output = self.policy(**self.inputs, return_step_log_probs=True)
        step_log_probs = output.step_log_probs.view(*self.shape, -1)  # (B, G, S, K)
        losses, _ = group_policy_loss(
            output.log_probs.view(self.shape), self.old_log_probs, self.advantages, self.mask, self.mask[..., 0]
        )
        kl = exact_kl(step_log_probs, self.reference, "reverse", self.mask)  # (B, G, S)
        loss = losses.mean() + BETA * kl.mean()
        loss.backward()
        return loss.detach()


def assert_equal(one: Step, other: Step, tolerance: float = 1e-5) -> None:
    """Raises `AssertionError` unless both sides have the same loss and gradients, up to a share of the largest."""
    torch.testing.assert_close(other(), one(), atol=tolerance, rtol=10 * tolerance)
    for (name, a), b in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        difference = (a.grad - b.grad).abs().max().item()
        limit = 100 * tolerance * a.grad.abs().max().item() + 0.1 * tolerance
        assert difference <= limit, f"gradients of {name} differ by {difference}"


def time_size(args: argparse.Namespace, group: int, shots: int, pool: int) -> dict[str, list[float]]:
    """Seconds of every side at one size, turn by turn."""
    size = (group, shots, pool)
    shared, expanded = Step(args, *size), Step(args, *size, expanded=True)
    assert_equal(shared, expanded)
    with ProductRecorder() as recorder:
        shared()
    steps: dict[str, Callable] = {"shared": shared, "expanded": expanded, "floor": recorder.replay}
    if args.compile:
        steps["compiled"] = Step(args, *size).compiled()
        assert_equal(shared, steps["compiled"])
    if args.bf16:
        steps["bf16"] = Step(args, *size, bf16=True)
        torch.testing.assert_close(steps["bf16"](), shared(), atol=0.02, rtol=0.05)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.warmup + args.repeats):
        for name, step in steps.items():
            elapsed = seconds(step, args.device)
            if turn >= args.warmup:
                times[name].append(elapsed)
    return times


def ratio(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


def run(args: argparse.Namespace) -> dict:
    """Times all sizes and returns the report."""
    rows, shared = [], {}
    for pool, shots, group in itertools.product(args.pool, args.shots, args.groups):
        times = time_size(args, group, shots, pool)
        shared[group, shots, pool] = times["shared"]
        sides = {f"{name}_seconds": spread(taken) for name, taken in times.items()}
        over = {
            f"{name}_speedup": ratio(times["shared"], times[name]) for name in ("compiled", "bf16") if name in times
        }
        speedup, of_floor = ratio(times["expanded"], times["shared"]), ratio(times["floor"], times["shared"])
        rows.append({"G": group, "S": shots, "K": pool, **sides, "speedup": speedup, "of_floor": of_floor, **over})
    targets = {}

    def check(name: str, values: dict[str, float], least: float) -> None:
        targets[name] = {**values, "target": f">= {least:g}", "met": values["median"] >= least}

    for row in rows:
        size = f"G {row['G']}, S {row['S']}, K {row['K']}"
        if row["G"] in SPEEDUP_TARGETS:
            check(f"speed-up at {size}", row["speedup"], SPEEDUP_TARGETS[row["G"]])
        check(f"floor over step at {size}", row["of_floor"], FLOOR_TARGET)
    low, high, most = GROWTH_TARGET
    for shots, pool in itertools.product(args.shots, args.pool):
        if {low, high} <= set(args.groups):
            values = ratio(shared[low, shots, pool], shared[high, shots, pool])
            check(f"shared, G {low} over G {high} at S {shots}, K {pool}", values, 1 / most)
    return {
        "machine": machine(args.device),
        "sizes": {name: getattr(args, name) for name in ("batch", "embed_dim", "hidden_dim")},
        "repeats": args.repeats,
        "rows": rows,
        "targets": targets,
    }


def show(report: dict) -> None:
    print(f"{report['machine']}\n{report['sizes']}, {report['repeats']} turns; median [min, max]\n")

    for row in report["rows"]:
        cells = [f"{name} {text(row[f'{name}_seconds'], 1e3, 0)} ms" for name in ("shared", "expanded", "floor")]
        cells += [f"speed-up {text(row['speedup'])}", f"floor/step {text(row['of_floor'])}"]
        cells += [
            f"{name} {text(row[f'{name}_speedup'])}" for name in ("compiled", "bf16") if f"{name}_speedup" in row
        ]
        print(f"G {row['G']:>2}  S {row['S']}  K {row['K']:>3}  " + "  ".join(cells))
    print()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-B", "--batch", type=int, default=32, help="queries in a batch (default %(default)s)")
    parser.add_argument("-G", "--groups", type=int, nargs="+", default=[1, 5, 16], help="group sizes")
    parser.add_argument("-S", "--shots", type=int, nargs="+", default=[2, 4], help="picks of a sequence")
    parser.add_argument("-K", "--pool", type=int, nargs="+", default=[64, 256], help="candidates of a pool")
    parser.add_argument("-D", "--embed-dim", type=int, default=768, help="embedding width (default %(default)s)")
    parser.add_argument("--hidden-dim", type=int, default=256, help="width of the network (default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time the step through torch.compile too")
    parser.add_argument("--bf16", action="store_true", help="time the step under bf16 autocast too")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, help="turns before the clock counts (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="S 2, K 64, 3 turns")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.quick:
        args.shots, args.pool, args.repeats = [2], [64], 3
    values = [args.batch, args.embed_dim, args.hidden_dim, args.repeats, *args.groups, *args.shots, *args.pool]
    if min(values) < 1:
        parser.error(f"a size is {min(values)}: all must be at least 1")
    if max(args.shots) > min(args.pool):
        parser.error(f"--shots has {max(args.shots)}, more than the {min(args.pool)} candidates of a pool; lower it")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    report = run(args)
    show(report)
    finish(report, args.output)


if __name__ == "__main__":
    main()
