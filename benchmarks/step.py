"""
Time of one GRPO step: the pool encoded once per query, against the pool expanded per beam.

Both sides are the same model with the same weights, the same batch and the same loss (clipped policy loss + exact KL,
forward and backward); they differ only in how the model is called:

* shared: B queries, pools (B, K, D), sequences (B, G, S);
* expanded: B·G queries, each with its own copy of its pool (B·G, K, D) and one sequence. The copies are made before
  the clock starts.

That losses and gradients are equal is checked first. Then the sides are timed in turns (A B A B …) in one process, and
ratios are taken within each turn. The floor is the time of the matrix products of the shared step alone, replayed.

    python benchmarks/step.py [--quick] [--output step.json]
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from _timing import machine, seconds, spread
from torch.utils._python_dispatch import TorchDispatchMode

from lever_grpo import PointerSelector, PointerSelectorConfig
from lever_grpo.objectives import exact_kl, group_advantages, group_policy_loss


PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
SPEEDUP_TARGET = (5, 4.0)  # at G 5: shared at least 4 times as fast as expanded
GROWTH_TARGET = (1, 16, 2.0)  # shared: G 16 below twice the time of G 1
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


class Step:
    """Forward and backward of the GRPO loss on one random batch with groups of `group` beams."""

    def __init__(self, args: argparse.Namespace, group: int, expanded: bool):
        generator = torch.Generator().manual_seed(0)
        device = torch.device(args.device)
        batch, shots, pool, width = args.batch, args.shots, args.pool, args.embed_dim
        self.shape = (batch, group, shots)
        torch.manual_seed(0)
        config = PointerSelectorConfig.from_preset("v3", embed_dim=width, hidden_dim=args.hidden_dim, dropout=0.0)
        self.model = PointerSelector(config).train()
        self.model.to(device)
        inputs = {
            "query_embeds": torch.randn(batch, width, generator=generator),
            "candidate_embeds": torch.randn(batch, pool, width, generator=generator),
            "sequences": torch.rand(batch, group, pool, generator=generator).argsort(-1)[..., :shots],
        }
        inputs = {name: x.to(device) for name, x in inputs.items()}
        self.advantages = group_advantages(torch.randn(batch, group, generator=generator)).to(device)  # (B, G)
        if group == 1:
            self.advantages = torch.ones(
                batch, 1, device=device
            )  # a group of one has no contrast; the work is the same
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
        self.inputs = inputs

    def __call__(self) -> torch.Tensor:
        self.model.zero_grad(set_to_none=True)
        output = self.model(**self.inputs, return_step_log_probs=True)
        step_log_probs = output.step_log_probs.view(*self.shape, -1)  # (B, G, S, K)
        losses, _ = group_policy_loss(
            output.log_probs.view(self.shape), self.old_log_probs, self.advantages, self.mask, self.mask[..., 0]
        )
        kl = exact_kl(step_log_probs, self.reference, "reverse", self.mask)  # (B, G, S)
        loss = losses.mean() + BETA * kl.mean()
        loss.backward()
        return loss.detach()


def assert_equal(shared: Step, expanded: Step) -> None:
    """Raises `AssertionError` unless both sides have the same loss and gradients."""
    torch.testing.assert_close(expanded(), shared(), atol=1e-5, rtol=1e-4)
    for (name, a), b in zip(shared.model.named_parameters(), expanded.model.parameters(), strict=True):
        difference = (a.grad - b.grad).abs().max().item()
        assert difference <= 1e-3 * a.grad.abs().max().item() + 1e-6, f"gradients of {name} differ by {difference}"


def run(args: argparse.Namespace) -> dict:
    """Times all sides in turns and returns the report."""
    steps: dict[tuple[str, int], Callable] = {}
    for group in args.groups:
        shared, expanded = Step(args, group, expanded=False), Step(args, group, expanded=True)
        assert_equal(shared, expanded)
        with ProductRecorder() as recorder:
            shared()
        steps |= {("shared", group): shared, ("expanded", group): expanded, ("floor", group): recorder.replay}
    times: dict[tuple[str, int], list[float]] = {key: [] for key in steps}
    for turn in range(args.warmup + args.repeats):
        for key, step in steps.items():
            elapsed = seconds(step, args.device)
            if turn >= args.warmup:
                times[key].append(elapsed)

    def ratio(above: tuple[str, int], below: tuple[str, int]) -> dict[str, float]:
        return spread([a / b for a, b in zip(times[above], times[below], strict=True)])

    report: dict = {
        "machine": machine(args.device),
        "sizes": {name: getattr(args, name) for name in ("batch", "shots", "pool", "embed_dim", "hidden_dim")},
        "repeats": args.repeats,
        "groups": {
            str(group): {
                **{f"{side}_seconds": spread(times[side, group]) for side in ("shared", "expanded", "floor")},
                "speedup": ratio(("expanded", group), ("shared", group)),
                "shared_over_floor": ratio(("shared", group), ("floor", group)),
            }
            for group in args.groups
        },
        "targets": {},
    }
    group, least = SPEEDUP_TARGET
    if group in args.groups:
        value = report["groups"][str(group)]["speedup"]
        report["targets"][f"speedup at G {group}"] = {
            **value,
            "target": f">= {least}",
            "met": value["median"] >= least,
        }
    low, high, most = GROWTH_TARGET
    if {low, high} <= set(args.groups):
        value = ratio(("shared", high), ("shared", low))
        report["targets"][f"shared G {high} / G {low}"] = {
            **value,
            "target": f"< {most}",
            "met": value["median"] < most,
        }
    return report


def show(report: dict) -> None:
    print(f"{report['machine']}\n{report['sizes']}, {report['repeats']} turns; median [min, max]\n")
    print(f"{'G':>3}  {'shared ms':>24}  {'expanded ms':>24}  {'floor ms':>8}  {'speed-up':>22}")

    def text(values: dict, scale: float, digits: int) -> str:
        median, low, high = (f"{scale * values[name]:.{digits}f}" for name in ("median", "min", "max"))
        return f"{median} [{low}, {high}]"

    for group, row in report["groups"].items():
        print(
            f"{group:>3}  {text(row['shared_seconds'], 1e3, 1):>24}  {text(row['expanded_seconds'], 1e3, 1):>24}  "
            f"{1e3 * row['floor_seconds']['median']:>8.1f}  {text(row['speedup'], 1, 2):>22}"
        )
    print()
    for name, row in report["targets"].items():
        print(f"{name}: {text(row, 1, 2)}, target {row['target']}: {'met' if row['met'] else 'MISSED'}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-B", "--batch", type=int, default=32, help="queries in a batch (default %(default)s)")
    parser.add_argument("-G", "--groups", type=int, nargs="+", default=[1, 5, 16], help="group sizes")
    parser.add_argument("-S", "--shots", type=int, default=2, help="picks of a sequence (default %(default)s)")
    parser.add_argument("-K", "--pool", type=int, default=64, help="candidates of a pool (default %(default)s)")
    parser.add_argument("-D", "--embed-dim", type=int, default=768, help="embedding width (default %(default)s)")
    parser.add_argument("--hidden-dim", type=int, default=256, help="width of the network (default %(default)s)")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="timed turns (default %(default)s)")
    parser.add_argument("--warmup", type=int, default=2, help="turns before the clock counts (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="3 turns after 1")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.quick:
        args.repeats, args.warmup = 3, 1
    for name in ("batch", "shots", "pool", "embed_dim", "hidden_dim", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.shots > args.pool:
        parser.error(f"--shots is {args.shots}, more than the {args.pool} candidates of a pool; lower it")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    report = run(args)
    show(report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
