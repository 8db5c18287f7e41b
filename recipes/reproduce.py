"""Run the flagship on every task of the sample over several seeds, with ablations, and write the table of the docs.

    python recipes/reproduce.py [--tasks emoji ...] [--seeds 5] [--jobs 2] [--output_dir outputs/reproduce]

For each task and seed: the flagship (SFT, agreement of answers, RCE, GRPO of `okvqa_v3.yaml`); where the log says
which answers were right, the same with these as a second reward; the flagship without the agreement of answers, so on
the log's scores alone; the literal original setting from the same SFT start; the original system in full (a v2
network from random weights, SFT, then the literal setting); and, on the tasks with 2,000 queries, SFT and GRPO of a v3
network on the similarity prior. Where there are many training queries, also learning
curves over their number. Then, for tasks with few held-out queries, a cross-validation of the
flagship: five folds of the training queries, each judged by selectors that were trained on the other four. A run that
is complete is not repeated, one that was cut off is resumed. Last, where the frozen model is installed, it answers the
held-out queries with what every method chose. Ends with `docs/results.md`, `docs/cross_validation.md` and
`docs/answers.md` (and `report.json` in the output folder), whatever they say.
"""

import argparse
import copy
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from datasets import Dataset

from lever_grpo import GroupBeamGRPOConfig
from lever_grpo.data import keep_sequences, list_samples
from lever_grpo.metrics import paired_interval
from lever_grpo.pipeline import RecipeArguments, judge, load_task, parse, train
from lever_grpo.pipeline.evaluate import evaluate, parse_evaluate
from lever_grpo.report import (
    MethodResult,
    load_results,
    pool_tasks,
    print_report,
    save_results,
    stack_seeds,
    to_markdown,
    write_report,
)
from lever_grpo.scorers.loading import default_model


HERE = Path(__file__).resolve().parent
FLAGSHIP = HERE / "okvqa_v3.yaml"
# training queries, beside all of them
LEARNING_CURVE = {"emoji": (150, 450), "supersense": (500, 1000), "easy_vqa": (500, 1000)}
# where groups hold more than what a search liked, there is more to learn from the scores
MORE = ["--sft_num_beams", "3", "--learning_rate", "1e-3", "--grpo_epochs", "10"]
CHANGES = {"supersense": MORE, "easy_vqa": MORE}
CROSS_VALIDATED = ("emoji", "country_facts")  # their held-out sets are small
FOLDS = 5
# beside the score, whether the answer was right, which only the search's scorer could tell
FOR_ANSWERS = {"reward_weights": {"beam": 0.25, "task": 2.0}, "task_reward": "correct"}
ANSWERED = {
    "supersense": "evaluate_supersense.yaml",
    "emoji": "evaluate_icl.yaml",
    "easy_vqa": "evaluate_easy_vqa.yaml",
}  # tasks whose model comes as a package
JUDGED = ("sft", "agreement", "rce", "grpo", "grpo_answers", "v2_sft", "v3_sft", "v3_grpo")
# the original setting, to the letter: the five best beams, π_old fixed at the start, an estimator for the KL, raw
# scores in RCE, advantages after the curriculum's cut, the last checkpoint
LITERAL = {
    "rce_epochs": 1.0,
    "grpo_epochs": 3.0,
    "curriculum_epochs": 1.0,
    "curriculum_first": True,
    "rce_normalize": False,
    "old_policy_refresh": "never",
    "kl_estimator": "k3",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "adaptive_beta": True,
    "restore_best": False,
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "rce_learning_rate": 3e-5,
    "learning_rate": 3e-4,
    "num_train_epochs": 4.0,
}
ORIGINAL_BEAMS = 5
V2 = {
    "model_preset": "v2",
    "similarity_prior": False,
    "hidden_dim": 256,
    "num_set_layers": 0,
    "dropout": 0.1,
    "agreement_steps": 0,
}
# a network as large on the similarity prior, where there are queries enough for one: chosen on validation queries
V3 = {**V2, "model_preset": "v3", "similarity_prior": True}


FOLD_NOTES = f"""\
The training queries in {FOLDS} folds, one seed: each query is judged by selectors that were trained without it,
without rows about its country or image, and with its row in no pool. The search scored about a third of the pairs;
where the choice of a method was not scored, its reward is an estimate (`complete_scores`), so the reference is the
table in [Results](results.md), whose rewards were all given by the model. The settings were chosen on these queries
too."""


ANSWERS_NOTES = """\
# Answers

SmolLM2-135M-Instruct answers the held-out queries with the demonstrations that each method chose: the share of right
answers. All methods choose from the same pools of 16; the selectors were trained to choose two demonstrations. "GRPO
answers" has the rightness of the logged answers as a second reward (weight 2, the score 0.25; chosen on the validation
queries of `supersense`). [Using and judging](evaluate.md) says what the other rows are.
"""


Arguments = TypeVar("Arguments", RecipeArguments, GroupBeamGRPOConfig)


def with_values(arguments: Arguments, values: dict) -> Arguments:
    """A copy of parsed arguments with other values."""
    changed = copy.copy(arguments)
    for name, value in values.items():
        setattr(changed, name, value)
    return changed


def best_beams(groups: Dataset, size: int) -> Dataset:
    """Groups of nothing but their best sequences, as logs that keep what a search ended with."""

    def cut(row: dict) -> dict:
        return keep_sequences(row, sorted(np.argsort(-np.array(row["scores"]), kind="stable")[:size].tolist()))

    return groups.map(cut, load_from_cache_file=False)


def run_fold(task: str, fold: int, output: Path) -> None:
    """The flagship, judged on a part of the training queries; ends with `results.json` in its folder."""
    folder = output / task / f"fold{fold}"
    if (folder / "results.json").exists():
        return
    options = ["--config", str(FLAGSHIP), "--task", task, "--output_dir", str(folder)]
    recipe, args = parse(
        [*options, *CHANGES.get(task, ()), "--heldout_fold", str(fold), "--heldout_size", str(1 / FOLDS)],
        GroupBeamGRPOConfig,
    )
    args.resume_from_checkpoint = "true"
    data = load_task(recipe, args.seed)
    selectors, _ = train(recipe, args, data, folder)
    save_results(judge(data, selectors), folder / "results.json")


def run_one(task: str, seed: int, queries: int | None, output: Path) -> None:
    """All methods of one task and seed; ends with `results.json` in its folder."""
    folder = output / task / (f"seed{seed}" if queries is None else f"queries{queries}-seed{seed}")
    if (folder / "results.json").exists():
        return
    options = ["--config", str(FLAGSHIP), "--task", task, "--seed", str(seed), "--output_dir", str(folder)]
    recipe, args = parse([*options, *CHANGES.get(task, ())], GroupBeamGRPOConfig)
    args.resume_from_checkpoint = "true"
    recipe.max_samples = queries
    data = load_task(recipe, seed)
    selectors, _ = train(recipe, args, data, folder)
    if queries is None:
        column = FOR_ANSWERS["task_reward"]  # estimated validation sets do not have it
        if all(column in (part.features.get("columns") or {}) for part in (data.train, data.validation)):
            again = with_values(recipe, {"sft_ckpt": selectors["sft"]})
            selectors["grpo_answers"] = train(again, with_values(args, FOR_ANSWERS), data, folder / "answers")[0][
                "grpo"
            ]
        literal = with_values(args, LITERAL)
        imitation = {"sft_epochs": 10.0, "sft_learning_rate": 3e-4, "sft_num_beams": ORIGINAL_BEAMS}
        original = with_values(recipe, {**V2, **imitation})
        survivors = replace(data, train=best_beams(data.train, ORIGINAL_BEAMS))
        from_start = with_values(recipe, {"sft_ckpt": selectors["sft"], "agreement_steps": 0})
        selectors["grpo_scores_alone"] = train(from_start, args, data, folder / "scores_alone")[0]["grpo"]
        selectors["grpo_literal"] = train(from_start, literal, survivors, folder / "literal")[0]["grpo"]
        v2, _ = train(original, literal, survivors, folder / "v2")
        selectors.update(v2_sft=v2["sft"], v2_grpo_literal=v2["grpo"])
        if task in CHANGES:
            network, slower = with_values(recipe, {**V3, **imitation}), with_values(args, {"learning_rate": 3e-4})
            v3, _ = train(network, slower, data, folder / "v3")
            selectors.update(v3_sft=v3["sft"], v3_grpo=v3["grpo"])
    save_results(judge(data, selectors), folder / "results.json")


def load_runs(output: Path, task: str, pattern: str) -> list[dict[str, MethodResult]]:
    """Results of the runs of a task, by method."""
    runs = [load_results(path) for path in sorted((output / task).glob(f"{pattern}/results.json"))]
    for run in runs:  # where the search ranked by all features, the two baselines are one
        run.setdefault("similarity_all", replace(run["similarity"], name="similarity_all"))
    return runs


def gather(output: Path, task: str, pattern: str) -> list[MethodResult]:
    """Results of all seeds of a task, one row per method."""
    runs = load_runs(output, task, pattern)
    return [stack_seeds([run[name] for run in runs]) for name in runs[0]]


def gather_folds(output: Path, task: str) -> list[MethodResult]:
    """Results of all folds of a task, side by side: every training query once."""
    runs = load_runs(output, task, "fold*")

    results = []
    for name, first in runs[0].items():
        rewards = np.concatenate([run[name].rewards for run in runs], axis=1)
        picks = None if first.picks is None else np.concatenate([run[name].picks for run in runs], axis=1)
        results.append(MethodResult(name, rewards, picks=picks))
    return results


def learning_curve(output: Path) -> list[dict]:
    """Share of the gap that is closed on held-out queries, against the number of training queries."""
    rows = []
    for task, sizes in LEARNING_CURVE.items():
        for size in (*sizes, None):
            pattern = "seed*" if size is None else f"queries{size}-seed*"
            if not any((output / task).glob(f"{pattern}/results.json")):
                continue
            results = {result.name: result.rewards for result in gather(output, task, pattern)}
            low, high = results["random"].mean(), results["oracle"].mean()
            names = ("similarity", "sft", "agreement", "rce", "grpo")
            gain = [value / (high - low) for value in paired_interval(results["grpo"], results["sft"])]
            rows.append(
                {"task": task, "training queries": size or "all", "seeds": len(results["grpo"])}
                | {name: f"{(results[name].mean() - low) / (high - low):.3f}" for name in names}
                | {"grpo - sft": f"{gain[0]:+.3f} [{gain[1]:+.3f}, {gain[2]:+.3f}]"}
            )
    return rows


def selectors_of(output: Path, task: str) -> list[str]:
    """All seeds of the selectors of a task, as `lever-grpo evaluate` takes them."""
    places = {"grpo_answers": "answers/grpo", "v2_sft": "v2/sft", "v3_sft": "v3/sft", "v3_grpo": "v3/grpo"}
    found = []
    for name in JUDGED:
        found += [f"{name}={path}" for path in sorted((output / task).glob(f"seed*/{places.get(name, name)}"))]
    return found


def answers(output: Path, tasks: list[str]) -> str | None:
    """What the frozen model answers with the choices of every method, as a page; `None` where it is not installed."""
    try:
        default_model()
    except ImportError as error:
        print(f"docs/answers.md stays as it is: {error}")
        return None
    parts = [ANSWERS_NOTES]
    for task in [task for task in ANSWERED if task in tasks]:
        options = ["--config", str(HERE / ANSWERED[task]), "--cache_dir", str(output / "cache")]
        folder = output / "answers" / task
        evaluation = evaluate(
            parse_evaluate([*options, "--output_dir", str(folder), "--selectors", *selectors_of(output, task)])
        )
        for report in evaluation["metrics"]["accuracy"].values():
            parts.append(to_markdown({**report, "settings": {}}).replace("\n## ", "\n### ").replace("# ", "## ", 1))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list_samples(), choices=list_samples())
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one core each")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/reproduce"))
    parser.add_argument("--docs", type=Path, default=HERE.parent / "docs", help="folder of the tables")
    parser.add_argument("--one", nargs=3, metavar=("TASK", "RUN", "QUERIES"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        task, name, queries = arguments.one
        if name.startswith("fold"):
            run_fold(task, int(name.removeprefix("fold")), arguments.output_dir)
        else:
            run_one(task, int(name), int(queries) or None, arguments.output_dir)
        return

    seeds = range(arguments.seeds)
    jobs: list[tuple[str, int | str, int]] = [(task, seed, 0) for task in arguments.tasks for seed in seeds]
    jobs += [(task, seed, n) for task in arguments.tasks for n in LEARNING_CURVE.get(task, ()) for seed in seeds[:3]]

    folded = [task for task in arguments.tasks if task in CROSS_VALIDATED]
    jobs += [(task, f"fold{fold}", 0) for task in folded for fold in range(FOLDS)]

    def launch(job: tuple) -> None:
        command = [sys.executable, __file__, "--output_dir", str(arguments.output_dir), "--one", *map(str, job)]
        log = arguments.output_dir / "logs" / ("-".join(map(str, job)) + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as stream:
            done = subprocess.run(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"{job}: {'done' if done.returncode == 0 else f'failed, see {log}'}", flush=True)
        if done.returncode:
            raise RuntimeError(f"{job} failed, see {log}")

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(launch, jobs))

    report = pool_tasks(
        {task: gather(arguments.output_dir, task, "seed*") for task in arguments.tasks},
        title="Results",
        sections={"Learning curve (share of the gap closed)": learning_curve(arguments.output_dir)},
    )
    write_report(report, arguments.output_dir)
    (arguments.docs / "results.md").write_text(to_markdown(report), encoding="utf-8")
    print_report(report)
    page = answers(arguments.output_dir, arguments.tasks)
    if page is not None:
        (arguments.docs / "answers.md").write_text(page, encoding="utf-8")
    if not folded:
        return
    folds = pool_tasks(
        {task: gather_folds(arguments.output_dir, task) for task in folded},
        title="Cross-validation",
        sections={"Notes": FOLD_NOTES},
    )
    write_report(folds, arguments.output_dir / "cross_validation")
    (arguments.docs / "cross_validation.md").write_text(to_markdown(folds), encoding="utf-8")
    print_report(folds)


if __name__ == "__main__":
    main()
