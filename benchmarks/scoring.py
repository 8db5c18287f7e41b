"""
Sequences per second of a search's scoring: `CausalLMScorer` against the straightforward way.

Both sides are the same model, the same weights and the same prompts, call by call as a search makes them: for some
queries all single demonstrations of their pools, then all extensions of each query's best ones, shot by shot. They
differ only in how the model is asked:

* straightforward: fixed batches in the given order, padded to their longest prompt, logits of the whole vocabulary at
  every position, log-softmax, pick the answer's tokens;
* scorer: beginnings that prompts share once, batches by a budget of tokens, logits of the answer's positions only;
* scorer, padded: the scorer without shared beginnings, sorted by length (with --padded).

Each pair is timed in float32 and in bfloat16, and with open answers and with a closed set of them, among which the
answer's log-probability is taken: the straightforward side computes it from the logits of the whole vocabulary, the
scorer computes the logits of the set alone. Speed-ups are those of sides that compute the same in the same dtype; one
more line compares the scorer in bfloat16 with the straightforward way in float32.

That scores are equal is checked first. Then the sides are timed in turns (A B C A B C …) in one process, and ratios
are taken within each turn. The share of the peak is what a side computes a second (operations of its products and of
its attention, as torch counts them) over what one big matrix product of its dtype does; `work` is what it computes,
over what the straightforward way does, so that 1 / work is the speed-up that equal shares would give.

The model is a Llama of SmolLM2-135M's shape with random weights, so nothing is downloaded; lengths of the prompts
follow short question-answer tasks.

    python benchmarks/scoring.py [--quick] [--shots 4 --construct-order right] [--output scoring.json]
"""

import argparse
import copy
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _timing import finish, machine, seconds, spread, text
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from lever_grpo.data import Example
from lever_grpo.data.orders import to_prompt_order
from lever_grpo.scorers import Prompt, PromptTemplate
from lever_grpo.scorers.causal_lm import CausalLMScorer


TARGET = 2.5
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.5}  # of the dtypes; bfloat16 is compared with float32
ANSWERS = tuple(f"w{i}" for i in range(8))  # of a closed set
KINDS = ("open", "closed")
# one token a word: "Question : … Answer : …", a line break after each demonstration
TEMPLATE = PromptTemplate(question="q : {question} a :", answer=" {answer}", stop=" .", separator=" ")


def smollm2(device: str) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
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
    model = LlamaForCausalLM(config).to(device).eval()
    words = ["q", "a", ":", ".", *(f"w{i}" for i in range(49152 - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def calls(args: argparse.Namespace, kind: str, seed: int = 0) -> list[list[Prompt]]:
    """What a search asks, a list a step: the extensions of the queries' best sequences, which are drawn here."""
    rng = random.Random(seed)

    def example(i: int) -> Example:
        def words(count: int) -> str:
            return " ".join(f"w{rng.randrange(49148)}" for _ in range(count))

        answer = rng.choice(ANSWERS) if kind == "closed" else words(rng.choice([1, 1, 1, 2, 3]))
        return Example(i, words(rng.randint(3, 14)), (answer,))

    rows = [example(i) for i in range(1000)]
    asked = rng.sample(rows, args.queries)
    pools = [rng.sample([row for row in rows if row is not query], args.pool) for query in asked]
    beams: list[list[tuple[int, ...]]] = [[()] for _ in asked]  # positions in the pool, in search order
    steps = []
    for _ in range(args.shots):
        found = [[(*beam, new) for beam in own for new in range(args.pool) if new not in beam] for own in beams]
        steps.append(
            [
                Prompt(query, tuple(pool[position] for position in to_prompt_order(sequence, args.construct_order)))
                for query, pool, sequences in zip(asked, pools, found, strict=True)
                for sequence in sequences
            ]
        )
        beams = [rng.sample(sequences, args.beams) for sequences in found]
    return steps


def straightforward(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[Prompt], size: int, kind: str
) -> list[np.ndarray]:
    """Fixed batches in the given order, right padding, all logits."""
    scores = []
    closed = torch.tensor(tokenizer(list(ANSWERS)).input_ids)[:, 0].to(model.device)
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
            picked = log_probs.gather(2, ids[:, 1:, None])[..., 0]  # (B, L - 1)
            if kind == "closed":
                picked = picked - log_probs[..., closed].logsumexp(-1)
        values = picked.cpu().double().numpy()
        for i, (b, a) in enumerate(zip(before, after, strict=True)):
            scores.append(values[i, len(b) - 1 : len(b) + len(a) - 1])
    return scores


def peak(dtype: str, device: str) -> float:
    """FLOP/s of a big matrix product: the best of a few."""
    size = 2048 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device, dtype=getattr(torch, dtype))
    return max(2 * size**3 / seconds(lambda: a @ b, device) for _ in range(5))


def run(args: argparse.Namespace) -> dict:
    """Times all sides in turns and returns the report."""
    model, tokenizer = smollm2(args.device)
    models = {dtype: copy.deepcopy(model).to(getattr(torch, dtype)) for dtype in args.dtypes}
    searches = {kind: calls(args, kind) for kind in KINDS}
    sequences = sum(map(len, searches["open"]))
    sides: dict[tuple[str, str, str], Callable[[], list]] = {}

    def add(side: str, dtype: str, kind: str) -> None:
        if side == "straightforward":
            sides[side, dtype, kind] = lambda: [
                straightforward(models[dtype], tokenizer, call, args.batch, kind) for call in searches[kind]
            ]
            return
        scorer = CausalLMScorer(
            models[dtype],
            tokenizer,
            TEMPLATE,
            answers=ANSWERS if kind == "closed" else None,
            token_budget=args.token_budget,
            share_prefixes=side == "scorer",
        )

        def ask() -> list:
            scorer._tokens._known.clear()  # tokenising counts for both sides
            return [scorer.score(call) for call in searches[kind]]

        sides[side, dtype, kind] = ask

    for dtype in args.dtypes:
        for kind in KINDS:
            for side in ("straightforward", "scorer", *(["scorer, padded"] if args.padded else [])):
                add(side, dtype, kind)

    scores, work = {}, {}
    for key, ask in sides.items():  # the warm-up too
        with FlopCounterMode(display=False) as counter:
            scores[key] = np.concatenate([np.concatenate(call) for call in ask()])
        work[key] = counter.get_total_flops()
    difference = {}
    for side, dtype, kind in sides:
        reference = scores["straightforward", args.dtypes[0], kind]
        value = difference[side, dtype, kind] = float(np.abs(scores[side, dtype, kind] - reference).max())
        assert value <= TOLERANCE[dtype], f"{side}, {dtype}: scores differ by {value}, more than {TOLERANCE[dtype]}"

    times: dict[tuple[str, str, str], list[float]] = {key: [] for key in sides}
    peaks: dict[str, list[float]] = {dtype: [] for dtype in args.dtypes}
    for _ in range(args.repeats):
        for dtype, values in peaks.items():
            values.append(peak(dtype, args.device))
        for key, ask in sides.items():
            times[key].append(seconds(ask, args.device))

    def speedup(key: tuple[str, str, str], over: str) -> dict[str, float]:
        reference = times["straightforward", over, key[2]]
        return spread([a / b for a, b in zip(reference, times[key], strict=True)])

    compared = {f"scorer, {dtype}, {kind} answers": (dtype, dtype, kind) for dtype in args.dtypes for kind in KINDS}
    if len(args.dtypes) == 2:
        one, other = args.dtypes
        compared |= {
            f"scorer in {other}, straightforward in {one}, {kind} answers": (other, one, kind) for kind in KINDS
        }
    targets = {}
    for name, (dtype, over, kind) in compared.items():
        ratio = speedup(("scorer", dtype, kind), over)
        targets[name] = {**ratio, "target": f">= {TARGET}", "met": ratio["median"] >= TARGET}
    names = ("queries", "pool", "beams", "shots", "construct_order", "batch", "token_budget")
    return {
        "machine": machine(args.device),
        "sizes": {name: getattr(args, name) for name in names},
        "repeats": args.repeats,
        "sequences": sequences,
        "peak_gflops": {dtype: spread([value / 1e9 for value in values]) for dtype, values in peaks.items()},
        "sides": [
            {
                "side": key[0],
                "dtype": key[1],
                "answers": key[2],
                "seconds": spread(values),
                "sequences_per_second": spread([sequences / value for value in values]),
                "share_of_peak": spread([work[key] / v / p for v, p in zip(values, peaks[key[1]], strict=True)]),
                "work": work[key] / work["straightforward", key[1], key[2]],
                "speedup": speedup(key, key[1]),
                "largest_difference": difference[key],
            }
            for key, values in times.items()
        ],
        "targets": targets,
    }


def show(report: dict) -> None:
    print(f"{report['machine']}\n{report['sizes']}")
    peaks = ", ".join(f"{dtype} {values['median']:.0f} GFLOP/s" for dtype, values in report["peak_gflops"].items())
    print(f"{report['sequences']} sequences, peak {peaks}, {report['repeats']} turns; median [min, max]\n")
    print(
        f"{'':>15} {'':>8} {'answers':>7} {'sequences/s':>18} {'share of peak':>17} {'work':>5} {'speed-up':>17} "
        "difference"
    )
    for row in report["sides"]:
        print(
            f"{row['side']:>15} {row['dtype']:>8} {row['answers']:>7} {text(row['sequences_per_second'], 1, 1):>18} "
            f"{text(row['share_of_peak']):>17} {row['work']:>5.2f} {text(row['speedup']):>17} "
            f"{row['largest_difference']:>10.1e}"
        )
    print()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1, help="queries of a search (default %(default)s)")
    parser.add_argument("--pool", type=int, default=16, help="candidates of a query (default %(default)s)")
    parser.add_argument("--beams", type=int, default=5, help="sequences that a step extends (default %(default)s)")
    parser.add_argument("--shots", type=int, default=2, help="demonstrations of the longest (default %(default)s)")
    parser.add_argument(
        "--construct-order", choices=("left", "right"), default="left", help="where a new one stands: first, or last"
    )
    parser.add_argument("--batch", type=int, default=16, help="straightforward: prompts of a batch")
    parser.add_argument("--token-budget", type=int, default=4096, help="scorer: tokens of a batch")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(TOLERANCE), default=list(TOLERANCE), help="of the model (default both)"
    )
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed turns (default %(default)s)")
    parser.add_argument("--padded", action="store_true", help="time the scorer without shared beginnings too")
    parser.add_argument("--quick", action="store_true", help="1 turn of one query")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.quick:
        args.repeats, args.queries = 1, 1
    for name in ("queries", "pool", "beams", "shots", "batch", "token_budget", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least 1")
    if max(args.beams, args.shots) > args.pool:
        parser.error(
            f"--beams is {args.beams} and --shots {args.shots}; neither may exceed the pool of {args.pool} candidates"
        )
    args.dtypes = [dtype for dtype in TOLERANCE if dtype in args.dtypes]  # the reference first
    return args


def main(arguments: list[str] | None = None) -> None:
    transformers_logging.set_verbosity_error()
    args = parse(arguments)
    report = run(args)
    show(report)
    finish(report, args.output)


if __name__ == "__main__":
    main()
