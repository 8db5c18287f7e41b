"""The `lever-grpo` command: one sub-command a function, each with its parser beside it."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .terminal import printable


if TYPE_CHECKING:
    from .demo import DemoArguments
    from .pipeline import RecipeArguments
    from .pipeline.evaluate_arguments import EvaluateArguments
    from .pipeline.generate_arguments import GenerateArguments
    from .pipeline.launch import CommandArguments
    from .trainer import GroupBeamGRPOConfig

ENVIRONMENT = (
    *("torch", "transformers", "trl", "datasets", "accelerate", "huggingface_hub", "peft", "deepspeed"),
    *("numpy", "pyarrow", "safetensors"),
)


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
    parser.add_argument("--score_column", "--score-column", metavar="NAME", help="reward column to take as the score")
    parser.add_argument(
        "--lower_is_better", "--lower-is-better", action="store_true", help="the best sequence has the lowest score"
    )
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
    if not report.groups:
        raise ValueError(f"{', '.join(args.log)}: expected at least one group, found none")
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        print_report(report, title=", ".join(args.log))
    return 1 if args.strict and report.warnings else 0


def add_generate(commands: argparse._SubParsersAction) -> None:
    _add_with_config(commands, "generate", "make a beam log", generate_classes, generate_command)


def generate_classes() -> list[Any]:
    from .pipeline.generate_arguments import GenerateArguments
    from .pipeline.launch import CommandArguments

    return [GenerateArguments, CommandArguments]


def generate_command(arguments: GenerateArguments, options: CommandArguments) -> int:
    """Search demonstrations with a frozen model and write the beam log. Returns 3 if `max_hours` were over before."""
    from .pipeline.generate import GenerationStopped, generate

    try:
        log = generate(arguments)
    except GenerationStopped as stopped:
        _print_result(stopped, {"log": None, "stopped": str(stopped)}, options.json)
        return 3
    manifest = json.loads((log.parent / "manifest.json").read_text(encoding="utf-8"))
    _print_result(log, {"log": str(log), **manifest["counts"]}, options.json)
    return 0


def add_evaluate(commands: argparse._SubParsersAction) -> None:
    _add_with_config(commands, "evaluate", "let the model answer", evaluate_classes, evaluate_command)


def evaluate_classes() -> list[Any]:
    from .pipeline.evaluate_arguments import EvaluateArguments
    from .pipeline.launch import CommandArguments

    return [EvaluateArguments, CommandArguments]


def evaluate_command(arguments: EvaluateArguments, options: CommandArguments) -> int:
    """Let the frozen model answer with the demonstrations of every method, and write which selection wins."""
    from .pipeline.evaluate import evaluate

    with _stdout_to_stderr(options.json):
        evaluation = evaluate(arguments)
    page, report = (f"{arguments.output_dir}/report.{kind}" for kind in ("html", "json"))
    queries = evaluation["settings"]["queries"]
    _print_result(page, {"report": report, "page": page, "queries": queries}, options.json)
    return 0


def add_demo(commands: argparse._SubParsersAction) -> None:
    _add_with_config(commands, "demo", "a page to try a selector", demo_classes, demo_command)


def demo_classes() -> list[Any]:
    from .demo import DemoArguments

    return [DemoArguments]


def demo_command(arguments: DemoArguments) -> int:
    """Serve a page that shows what every method picks for a query, and what the frozen model then answers."""
    from .demo.app import run_demo

    run_demo(arguments)
    return 0


def add_train(commands: argparse._SubParsersAction) -> None:
    _add_with_config(commands, "train", "post-train a selector", train_classes, train_command)


def train_classes() -> list[Any]:
    from .pipeline import RecipeArguments
    from .pipeline.launch import CommandArguments
    from .trainer import GroupBeamGRPOConfig

    return [RecipeArguments, GroupBeamGRPOConfig, CommandArguments]


def train_command(recipe: RecipeArguments, training: GroupBeamGRPOConfig, options: CommandArguments) -> int:
    """Post-train a selector, SFT → RCE → GRPO, and report what each stage gained, as `recipes/okvqa_v3.py` does."""
    from .pipeline import run
    from .pipeline.arguments import settle_resume

    settle_resume(training)
    with _stdout_to_stderr(options.json):
        run(recipe, training)
    if options.json:
        report = None if recipe.dry_run else f"{training.output_dir}/report.json"
        _print_result("", {"output_dir": training.output_dir, "report": report}, True)
    return 0


def _add_with_config(
    commands: argparse._SubParsersAction,
    name: str,
    help_line: str,
    classes: Callable[[], list[Any]],
    command: Callable[..., int],
) -> None:
    """A command whose options are the fields of data classes, which are imported when it is called."""
    # no "-" among its prefixes: every argument goes on to the parser of the classes, `--help` too
    parser = commands.add_parser(name, help=help_line, prefix_chars="+", add_help=False)
    parser.add_argument("arguments", nargs="*", help="--config FILE and options; --help lists them")
    parser.set_defaults(run=_run_with_config, name=name, prog=parser.prog, classes=classes, command=command)


def _run_with_config(args: argparse.Namespace) -> int:
    """Reads the options of such a command and runs it, here or in the processes of `accelerate_config`."""
    from accelerate import PartialState

    from .pipeline.launch import CommandArguments, launch
    from .pipeline.parsing import read_values, to_dataclasses

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    classes = args.classes()
    values = read_values(classes, args.arguments, args.prog)
    if CommandArguments in classes:
        (options,) = to_dataclasses([CommandArguments], values)
        if options.launches:
            return launch(args.name, args.arguments, options)
    with _one_line():
        code = args.command(*to_dataclasses(classes, values))
    PartialState().destroy_process_group()  # a process that ends with its threads at work may abort, its work done
    return code


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """Inside, what the user has to install or to mend is an error of one line."""
    from .scorers import ScorerError

    try:
        yield
    except (ImportError, ScorerError) as error:
        raise ValueError(error) from error


def _stdout_to_stderr(wanted: bool) -> contextlib.AbstractContextManager:
    return contextlib.redirect_stdout(sys.stderr) if wanted else contextlib.nullcontext()


def _print_result(text: object, values: dict[str, Any], as_json: bool) -> None:
    """What came out, for people or for programs, once."""
    from accelerate import PartialState

    if PartialState().is_main_process:
        print(json.dumps(values, indent=2) if as_json else text)


def add_select(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("select", help="pick demonstrations", description=select_command.__doc__)
    parser.add_argument("selector", help="a trained selector: folder or Hub id")
    parser.add_argument("--queries", required=True, metavar="FILE", help="rows: id, question, image if any")
    parser.add_argument("--candidates", required=True, metavar="FILE", help="rows with answers")
    parser.add_argument("--out", required=True, metavar="FILE", help="JSON lines to write, one a query")
    parser.add_argument("--num_shots", type=int, default=2, help="demonstrations of a query (default %(default)s)")
    parser.add_argument("--pool_size", type=int, default=64, help="candidates of a query (default %(default)s)")
    parser.add_argument(
        "--sampler",
        choices=("random", "text_sim", "image_sim", "mix"),  # METHODS of search/samplers.py, not imported for a --help
        default="text_sim",
        help="how pools are chosen (default %(default)s)",
    )
    parser.add_argument("--ratios", nargs="+", metavar="METHOD=SHARE", help="shares of mix")
    parser.add_argument("--query_embeddings", metavar="PATH", help="instead of encoders: .safetensors, .npy, folder")
    parser.add_argument("--candidate_embeddings", metavar="PATH", help="the same; row i is the file's i-th row")
    parser.add_argument("--construct_order", choices=("left", "right"), default="left", help="of the training log")
    parser.add_argument("--seed", type=int, default=0, help="of random pools (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=select_command)


def select_command(args: argparse.Namespace) -> int:
    """Pick demonstrations for raw queries with a trained selector, in prompt order."""
    from .data import EmbeddingStore, load_examples
    from .inference import DemonstrationSelector, write_selections
    from .search.samplers import parse_ratios

    def opened(path: str | None) -> EmbeddingStore | None:
        return None if path is None else EmbeddingStore.open(path)

    with _one_line():  # encoders come in packages
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
    print(json.dumps({"selections": args.out, "queries": len(picked)}, indent=2) if args.json else args.out)
    return 0


def add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("convert", help="take in a public checkpoint", description=convert_command.__doc__)
    parser.add_argument("checkpoint", help="of Lever-LM or Lever-Plus: .ckpt, .pt, .pth or .safetensors")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
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
    if args.json:
        found = {name: getattr(conversion, name) for name in ("family", "num_weights", "assumed", "left_out")}
        print(json.dumps({"selector": args.output_dir, **found}, indent=2))
    else:
        print(conversion)
        print(args.output_dir)
    return 0


def add_push(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("push", help="push to the Hugging Face Hub", description=push_command.__doc__)
    parser.add_argument("folder", help="of a selector, a run, a beam log (or its file) or a report")
    parser.add_argument("repo_id", help="repository, as in me/my-selector; made if it is not there")
    parser.add_argument(
        "--repo_type", "--repo-type", choices=("model", "dataset"), help="default: logs are datasets, all else models"
    )
    parser.add_argument("--private", action="store_true", default=None, help="make it private; default: the account's")
    parser.add_argument("--rows", metavar="FILE", help="of a log: questions, answers and images, to be published too")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=push_command)


def push_command(args: argparse.Namespace) -> int:
    """Push a selector with its card, a run, a beam log as a dataset, or a report. Log in with `hf auth login`."""
    from huggingface_hub.errors import HTTPError

    from .data import load_examples
    from .hub import push_folder

    options = {} if args.rows is None else {"rows": load_examples(args.rows)}
    try:
        url = push_folder(args.folder, args.repo_id, repo_type=args.repo_type, private=args.private, **options)
    except HTTPError as error:  # not all of them are an OSError
        raise OSError(f"the Hub did not take {args.folder}: {type(error).__name__}: {error}") from error
    print(json.dumps({"repo_id": args.repo_id, "url": url}, indent=2) if args.json else url)
    return 0


def add_env(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("env", help="versions, for a bug report", description=env_command.__doc__)
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.set_defaults(run=env_command)


def env_command(args: argparse.Namespace) -> int:
    """Print the versions, accelerators and settings that a bug report needs."""
    import torch
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    lines: dict[str, Any] = {
        "lever_grpo": _version("lever-grpo"),
        "Python": platform.python_version(),
        "Platform": platform.platform(),
    }
    lines.update({name: _version(name) for name in ENVIRONMENT})
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines["Accelerator"] = ", ".join(devices) or "none (CPU)"
    found = os.path.isfile(default_config_file)
    lines["Accelerate config"] = load_config_from_file(default_config_file).to_dict() if found else "none"
    if args.json:
        print(json.dumps(lines, indent=2))
    else:
        print("\n".join(f"- {name}: {value}" for name, value in lines.items()))
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def add_completion(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("completion", help="script of a shell", description=completion_command.__doc__)
    parser.add_argument("shell", choices=("bash", "zsh", "tcsh"), help="whose script to print")
    parser.set_defaults(run=completion_command)


def completion_command(args: argparse.Namespace) -> int:
    """Print a script that completes commands, options and choices: `eval "$(lever-grpo completion bash)"`."""
    from .pipeline.parsing import make_parser

    try:
        import shtab
    except ImportError as error:
        message = "completion needs shtab, which is not installed: pip install 'lever_grpo[completion]'"
        raise ValueError(message) from error
    whole = build_parser()
    (commands,) = (action for action in whole._actions if isinstance(action, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        classes = parser.get_default("classes")
        if classes is not None:
            commands.choices[name] = parser = make_parser(classes(), parser.prog)
        for action in parser._actions:
            flags = [flag for flag in action.option_strings if "-" not in flag[2:]]
            action.option_strings = flags or action.option_strings  # one spelling is enough
            if action.nargs != 0 and not action.choices and action.type in (None, str):
                action.complete = shtab.FILE
    print(shtab.complete(whole, args.shell))
    return 0


COMMANDS = (
    *(add_inspect, add_generate, add_train, add_select, add_evaluate, add_demo, add_convert, add_push, add_env),
    add_completion,
)


def build_parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(prog="lever-grpo", description="Post-train demonstration selectors on beam logs.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code: 0; 1 for a check that failed; 2 for input that cannot be used; 3 if it was
    stopped by `max_hours`; 130 if it was interrupted. With LEVER_GRPO_DEBUG set, 2 becomes a traceback.

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
    except KeyboardInterrupt:
        print("lever-grpo: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("LEVER_GRPO_DEBUG"):
            raise
        # BeamDataError is a ValueError; what the user can mend is one line, what is our fault keeps its traceback
        print(f"lever-grpo: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
