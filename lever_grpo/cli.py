"""The `lever-grpo` command: one sub-command a function, each with its parser beside it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import sys
from collections.abc import Sequence


ENVIRONMENT = ("torch", "transformers", "trl", "datasets", "accelerate", "peft", "numpy", "pyarrow", "safetensors")


def add_inspect(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("inspect", help="health report of a beam log", description=inspect_command.__doc__)
    parser.add_argument("log", nargs="+", help="beam log of any known format: files, folders or patterns")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when there are warnings")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--pools", metavar="FILE", help="candidate pools, for logs that do not hold them")
    parser.add_argument(
        "--embeddings", metavar="PATH", help="embeddings to check against: .safetensors, .npy, or a folder"
    )
    parser.add_argument("--shots", type=int, nargs="+", help="look at these lengths only, one group a length")
    parser.add_argument("--score-column", metavar="NAME", help="reward column to take as the score")
    parser.add_argument("--lower-is-better", action="store_true", help="the best sequence has the lowest score")
    parser.set_defaults(run=inspect_command)


def inspect_command(args: argparse.Namespace) -> int:
    """Read a beam log (nothing is written) and report its groups, lengths, pools, scores, ties and contrast, with
    warnings.

    Where pools are missing they are rebuilt from the beams, which is one of the warnings.
    """
    from .data import EmbeddingStore, inspect_log, load_beams, print_report

    store = None if args.embeddings is None else EmbeddingStore.open(args.embeddings)
    groups = load_beams(
        args.log,
        candidate_pools=args.pools,
        rebuild_pools=True,
        shots=args.shots,
        score_column=args.score_column,
        higher_is_better=not args.lower_is_better,
        streaming=True,
    )
    loader_log = logging.getLogger("lever_grpo.data")
    level = loader_log.level
    loader_log.setLevel(logging.ERROR)  # the report says what was dropped; the loader need not say it too
    try:
        report = inspect_log(groups, store=store)
    finally:
        loader_log.setLevel(level)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, title=", ".join(args.log))
    return 1 if args.strict and report.warnings else 0


def add_generate(commands: argparse._SubParsersAction) -> None:
    # no "-" among its prefixes: every argument goes on to the parser of GenerateArguments, `--help` too
    parser = commands.add_parser("generate", help="make a beam log", prefix_chars="+", add_help=False)
    parser.add_argument("arguments", nargs="*", help="--config FILE and options; --help lists them")
    parser.set_defaults(run=generate_command)


def generate_command(args: argparse.Namespace) -> int:
    """Search demonstrations with a frozen model and write the beam log. Returns 3 if `max_hours` were over before."""
    from .pipeline.generate import GenerationStopped, generate, parse_generate
    from .scorers import ScorerError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        print(generate(parse_generate(args.arguments)))
    except GenerationStopped as stopped:
        print(stopped)
        return 3
    except (ImportError, ScorerError) as error:
        raise ValueError(error) from error  # something to install or to mend
    return 0


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="let the model answer", prefix_chars="+", add_help=False)
    parser.add_argument("arguments", nargs="*", help="--config FILE and options; --help lists them")
    parser.set_defaults(run=evaluate_command)


def evaluate_command(args: argparse.Namespace) -> int:
    """Let the frozen model answer with the demonstrations of every method, and write which selection wins."""
    from .pipeline.evaluate import evaluate, parse_evaluate
    from .scorers import ScorerError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    arguments = parse_evaluate(args.arguments)
    try:
        evaluate(arguments)
    except (ImportError, ScorerError) as error:
        raise ValueError(error) from error  # something to install or to mend
    print(f"{arguments.output_dir}/report.html")
    return 0


def add_train(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("train", help="post-train a selector", prefix_chars="+", add_help=False)
    parser.add_argument("arguments", nargs="*", help="--config FILE and options; --help lists them")
    parser.set_defaults(run=train_command)


def train_command(args: argparse.Namespace) -> int:
    """Post-train a selector, SFT → RCE → GRPO, and report what each stage gained, as `recipes/okvqa_v3.py` does."""
    from .pipeline import parse, run
    from .trainer import GroupBeamGRPOConfig

    run(*parse(args.arguments, GroupBeamGRPOConfig))
    return 0


def add_select(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("select", help="pick demonstrations", description=select_command.__doc__)
    parser.add_argument("selector", help="a trained selector: folder or Hub id")
    parser.add_argument("--queries", required=True, metavar="FILE", help="rows: id, question, image if any")
    parser.add_argument("--candidates", required=True, metavar="FILE", help="rows with answers")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write, one a query")
    parser.add_argument("--num_shots", type=int, default=2, help="demonstrations of a query (default %(default)s)")
    parser.add_argument("--pool_size", type=int, default=64, help="candidates of a query (default %(default)s)")
    parser.add_argument("--sampler", default="text_sim", help="random, text_sim, image_sim or mix (default text_sim)")
    parser.add_argument("--ratios", nargs="+", metavar="METHOD=SHARE", help="shares of mix")
    parser.add_argument("--query_embeddings", metavar="PATH", help="instead of encoders: .safetensors, .npy, folder")
    parser.add_argument("--candidate_embeddings", metavar="PATH", help="the same; row i is the file's i-th row")
    parser.add_argument("--construct_order", choices=("left", "right"), default="left", help="of the training log")
    parser.add_argument("--seed", type=int, default=0, help="of random pools (default %(default)s)")
    parser.set_defaults(run=select_command)


def select_command(args: argparse.Namespace) -> int:
    """Pick demonstrations for raw queries with a trained selector, in prompt order."""
    from .data import EmbeddingStore, load_examples
    from .inference import DemonstrationSelector, write_selections
    from .search.samplers import parse_ratios

    def opened(path: str | None) -> EmbeddingStore | None:
        return None if path is None else EmbeddingStore.open(path)

    selector = DemonstrationSelector.from_pretrained(args.selector, construct_order=args.construct_order)
    selector.set_candidates(load_examples(args.candidates), opened(args.candidate_embeddings))
    picked = selector.select(
        load_examples(args.queries, need_answers=False),
        args.num_shots,
        pool_size=args.pool_size,
        sampler=args.sampler,
        ratios=parse_ratios(args.ratios),
        seed=args.seed,
        embeddings=opened(args.query_embeddings),
    )
    write_selections(picked, args.out)
    print(args.out)
    return 0


def add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="take in a public checkpoint", description=convert_command.__doc__)
    parser.add_argument("checkpoint", help="of Lever-LM or Lever-Plus: .ckpt, .pt, .pth or .safetensors")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--num_attention_heads", type=int, metavar="N", help="default: Lever-LM 8, Lever-Plus 1")
    plus = parser.add_argument_group("Lever-Plus")
    plus.add_argument(
        "--logit_temperature", type=float, metavar="T", help="default: as the checkpoint says, else Lever-Plus's own"
    )
    lm = parser.add_argument_group("Lever-LM")
    lm.add_argument("--query_features", nargs="+", metavar="NAME", help="its query_encoding_flag (default image text)")
    lm.add_argument("--candidate_features", nargs="+", metavar="NAME", help="its icd_encoding_flag (default none)")
    lm.add_argument("--max_shots", type=int, metavar="N", help="longest sequence (default 8)")
    parser.set_defaults(run=convert_command)


def convert_command(args: argparse.Namespace) -> int:
    """Write a public Lever-LM or Lever-Plus checkpoint as a selector, without running anything in the file."""
    from .convert import convert_checkpoint

    conversion = convert_checkpoint(
        args.checkpoint,
        args.output_dir,
        num_attention_heads=args.num_attention_heads,
        logit_temperature=args.logit_temperature,
        query_features=args.query_features,
        candidate_features=args.candidate_features,
        max_shots=args.max_shots,
    )
    print(conversion)
    print(args.output_dir)
    return 0


def add_env(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="versions, for a bug report", description=env_command.__doc__)
    parser.set_defaults(run=env_command)


def env_command(args: argparse.Namespace) -> int:
    """Print the versions that a bug report needs."""
    import torch

    lines = {
        "lever_grpo": _version("lever-grpo"),
        "Python": platform.python_version(),
        "Platform": platform.platform(),
    }
    lines.update({name: _version(name) for name in ENVIRONMENT})
    lines["Accelerator"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    for name, value in lines.items():
        print(f"- {name}: {value}")
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


COMMANDS = (add_inspect, add_generate, add_train, add_select, add_evaluate, add_convert, add_env)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lever-grpo", description="Post-train demonstration selectors on beam logs.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0, 1 for a check that failed, 2 for input that cannot be used.

    Example:

    ```python
    >>> from lever_grpo.cli import main
    >>> main(["env"])  # doctest: +ELLIPSIS
    - lever_grpo: ...
    0

    ```
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, OSError) as error:
        # BeamDataError is a ValueError; what the user can mend is one line, what is our fault keeps its traceback
        print(f"lever-grpo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
