"""
Sequences per second of a search's scoring: `CausalLMScorer` against the straightforward way.

Both sides are the same model, the same weights and the same prompts, call by call as a search makes them: for some
queries all single demonstrations of their pools, then all extensions of each query's best ones. They differ only in
how the model is asked:

* straightforward: fixed batches in the given order, padded to their longest prompt, logits of the whole vocabulary at
  every position, log-softmax, pick the answer's tokens;
* scorer: beginnings that prompts share once, batches by a budget of tokens, logits of the answer's positions only;
* scorer, bfloat16: the scorer on the same weights in bfloat16 (left out if that is the dtype of all);
* scorer, padded: the scorer without shared beginnings, sorted by length (with --padded).

That all scores are equal is checked first. Then the sides are timed in turns (A B C A B C …) in one process, and
ratios are taken within each turn. The first two are in one dtype. The peak is one big
matrix product in that dtype; the share of it that a side reaches counts 2 · parameters · tokens for the tokens of
the prompts as they were asked, so work that a side spares counts as done, and a share may exceed 1.

The model is a Llama of SmolLM2-135M's shape with random weights, so nothing is downloaded; lengths of the prompts
follow short question-answer tasks.

    python benchmarks/scoring.py [--quick] [--dtype bfloat16] [--output scoring.json]
"""

import argparse
import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import machine, seconds, spread
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lever_grpo.data import Example
from lever_grpo.scorers import Prompt, PromptTemplate
from lever_grpo.scorers.causal_lm import CausalLMScorer


TARGET = 2.5
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}
# one token a word: "Question : … Answer : …", a line break after each demonstration
TEMPLATE = PromptTemplate(question="q : {question} a :", answer=" {answer}", stop=" .", separator=" ")


def smollm2(dtype: str, device: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random model of SmolLM2-135M's shape, and a tokenizer of as many words."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100_000,
        tie_word_embeddings=True,
        initializer_range=0.04,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device, getattr(torch, dtype)).eval()
    words = ["q", "a", ":", ".", *(f"w{i}" for i in range(49152 - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def calls(queries: int, pool: int, beams: int, seed: int = 0) -> list[list[Prompt]]:
    """What a search of two shots asks: the singles of all queries, then the pairs. Left construction."""
    rng = random.Random(seed)

    def example(i: int) -> Example:
        def words(count: int) -> str:
            return " ".join(f"w{rng.randrange(49148)}" for _ in range(count))

        return Example(i, words(rng.randint(3, 14)), (words(rng.choice([1, 1, 1, 2, 3])),))

    rows = [example(i) for i in range(1000)]
    asked = rng.sample(rows, queries)
    pools = [rng.sample([row for row in rows if row is not query], pool) for query in asked]
    singles = [Prompt(query, (new,)) for query, pool in zip(asked, pools, strict=True) for new in pool]
    pairs = [
        Prompt(query, (new, parent))
        for query, pool in zip(asked, pools, strict=True)
        for parent in rng.sample(pool, beams)
        for new in pool
        if new is not parent
    ]
    return [singles, pairs]


def straightforward(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], size: int
) -> list[np.ndarray]:
    """Fixed batches in the given order, right padding, all logits."""
    scores = []
    for start in range(0, len(prompts), size):
        batch = prompts[start : start + size]
        before = [tokenizer(TEMPLATE.text(list(p.demonstrations), p.query)).input_ids for p in batch]
        after = [tokenizer(TEMPLATE.of_answer(p.query)).input_ids for p in batch]
        width = max(len(b) + len(a) for b, a in zip(before, after, strict=True))
        ids, mask = torch.zeros(2, len(batch), width, dtype=torch.long)
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            ids[i, : len(b) + len(a)] = torch.tensor(b + a)
            mask[i, : len(b) + len(a)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, L, V)
            log_probs = logits[:, :-1].float().log_softmax(-1)
            picked = log_probs.gather(2, ids[:, 1:, None])[..., 0].cpu().double().numpy()  # (B, L - 1)
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            scores.append(picked[i, len(b) - 1 : len(b) + len(a) - 1])
    return scores


def peak(dtype: str, device: str) -> float:
    """FLOP/s of a big matrix product: the best of a few."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    return max(2 * size**3 / seconds(lambda: a @ b, device) for _ in range(5))


def run(args: argparse.Namespace) -> dict:
    """Times all sides in turns and returns the report."""
    model, tokenizer = smollm2(args.dtype, args.device)
    searches = calls(args.queries, args.pool, args.beams)
    sequences = sum(map(len, searches))
    shared = CausalLMScorer(model, tokenizer, TEMPLATE, token_budget=args.token_budget)

    def fresh(scorer: CausalLMScorer) -> CausalLMScorer:
        scorer._tokens._known.clear()  # tokenising counts for both sides
        return scorer

    sides: dict[str, Callable[[], list]] = {
        "straightforward": lambda: [straightforward(model, tokenizer, call, args.batch) for call in searches],
        "scorer": lambda: [fresh(shared).score(call) for call in searches],
    }
    if args.dtype != "bfloat16":
        half = CausalLMScorer(copy.deepcopy(model).bfloat16(), tokenizer, TEMPLATE, token_budget=args.token_budget)
        sides["scorer, bfloat16"] = lambda: [fresh(half).score(call) for call in searches]
    if args.padded:
        padded = CausalLMScorer(model, tokenizer, TEMPLATE, token_budget=args.token_budget, share_prefixes=False)
        sides["scorer, padded"] = lambda: [fresh(padded).score(call) for call in searches]
    scores = {side: [np.concatenate(call) for call in ask()] for side, ask in sides.items()}  # the warm-up too
    difference = {
        side: max(float(np.abs(a - b).max()) for a, b in zip(scores[side], scores["straightforward"], strict=True))
        for side in sides
    }
    for side, value in difference.items():
        allowed = TOLERANCE["bfloat16" if "bfloat16" in side else args.dtype]
        assert value <= allowed, f"scores of {side} differ by {value}, more than {allowed}"
    times: dict[str, list[float]] = {side: [] for side in sides}
    peaks = []
    for _ in range(args.repeats):
        peaks.append(peak(args.dtype, args.device))
        for side, ask in sides.items():
            times[side].append(seconds(ask, args.device))
    tokens = sum(
        len(tokenizer(TEMPLATE.text(list(p.demonstrations), p.query) + TEMPLATE.of_answer(p.query)).input_ids)
        for call in searches
        for p in call
    )
    flops = 2 * sum(parameter.numel() for parameter in model.parameters()) * tokens
    speedups = {
        side: spread([a / b for a, b in zip(times["straightforward"], values, strict=True)])
        for side, values in times.items()
    }
    return {
        "machine": machine(args.device),
        "sizes": {
            name: getattr(args, name) for name in ("queries", "pool", "beams", "batch", "token_budget", "dtype")
        },
        "repeats": args.repeats,
        "sequences": sequences,
        "tokens": tokens,
        "peak_gflops": spread([value / 1e9 for value in peaks]),
        "sides": {
            side: {
                "seconds": spread(values),
                "sequences_per_second": spread([sequences / value for value in values]),
                "share_of_peak": spread([flops / v / p for v, p in zip(values, peaks, strict=True)]),
                "speedup": speedups[side],
                "largest_difference": difference[side],
            }
            for side, values in times.items()
        },
        "targets": {
            f"{side} over straightforward in {args.dtype}": {
                **speedups[side],
                "target": f">= {TARGET}",
                "met": speedups[side]["median"] >= TARGET,
            }
            for side in ("scorer", "scorer, bfloat16")
            if side in speedups
        },
    }


def show(report: dict) -> None:
    print(f"{report['machine']}\n{report['sizes']}")
    peak_gflops = report["peak_gflops"]["median"]
    print(
        f"{report['sequences']} sequences, {report['tokens']} tokens, peak {peak_gflops:.0f} GFLOP/s, "
        f"{report['repeats']} turns; median [min, max]\n"
    )

    def text(values: dict, digits: int) -> str:
        median, low, high = (f"{values[name]:.{digits}f}" for name in ("median", "min", "max"))
        return f"{median} [{low}, {high}]"

    print(f"{'':>16}  {'sequences/s':>22}  {'share of peak':>20}  {'speed-up':>20}  largest difference")
    for side, row in report["sides"].items():
        print(
            f"{side:>16}  {text(row['sequences_per_second'], 1):>22}  {text(row['share_of_peak'], 2):>20}  "
            f"{text(row['speedup'], 2):>20}  {row['largest_difference']:.1e}"
        )
    print()
    for name, row in report["targets"].items():
        print(f"{name}: {text(row, 2)}, target {row['target']}: {'met' if row['met'] else 'MISSED'}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1, help="queries of a search (default %(default)s)")
    parser.add_argument("--pool", type=int, default=16, help="candidates of a query (default %(default)s)")
    parser.add_argument("--beams", type=int, default=5, help="parents of a query's pairs (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="straightforward: prompts of a batch")
    parser.add_argument("--token-budget", type=int, default=4096, help="scorer: tokens of a batch")
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="float32", help="of the model")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default %(default)s)")
    parser.add_argument("--padded", action="store_true", help="time the scorer without shared beginnings too")
    parser.add_argument("--quick", action="store_true", help="1 turn of one query")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.quick:
        args.repeats, args.queries = 1, 1
    for name in ("queries", "pool", "beams", "batch", "token_budget", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if args.beams > args.pool:
        parser.error(f"--beams is {args.beams}, more than the {args.pool} candidates of a pool; lower it")
    return args


def main(arguments: list[str] | None = None) -> None:
    transformers_logging.set_verbosity_error()
    args = parse(arguments)
    report = run(args)
    show(report)
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
