"""What a choice of demonstrations is worth: the frozen model answers with those of every method.

`output_dir` holds `report.json`, `report.html` and a `report.md` for each metric and number of shots; `picks.json`,
what every method chose; and in `answers/` what the model answered, by prompt: a run that was stopped goes on, and a
selector that is added later costs its own prompts only.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from accelerate import PartialState
from datasets import Dataset
from numpy.typing import NDArray
from transformers import AutoProcessor

from ..atomic import atomic_file, one_run, refuse_links
from ..data import (
    DataCollatorForBeams,
    DataCollatorForRawBeams,
    EmbeddingStore,
    list_samples,
    load_beams,
    load_sample,
    to_prompt_order,
)
from ..data.examples import Example
from ..data.pools import PoolSource
from ..inference import best_logged, choose, mixed_picks, mmr_picks, random_picks
from ..inference.answering import Answered, Question, answer_questions, read_answers
from ..metrics import token_f1
from ..models import ClipSelector, SelectorConfig, load_selector
from ..report import MethodResult, build_report, print_report, stack_seeds, write_html, write_report
from ..report.html import image_uri
from ..scorers import Scorer
from ..search import make_judge
from ..search.judges import Judge
from .evaluate_arguments import BASELINES, METRICS, EvaluateArguments, parse_evaluate
from .frozen_model import FrozenModelArguments, load_rows, make_scorer, open_store
from .generate_folder import FREE, agree, rows_digest
from .runs import similarity_baseline
from .task_data import make_collator


__all__ = ["EvaluateArguments", "evaluate", "parse_evaluate"]

logger = logging.getLogger(__name__)

Picks = dict[str, list[list[list[int]]]]  # method -> seeds (or draws) -> queries -> row ids in prompt order


@dataclass
class Queries:
    """What is asked: queries with their pools, the embeddings and which of them baselines see, the rows."""

    dataset: Dataset
    store: EmbeddingStore
    collator: DataCollatorForBeams
    similarity: tuple[str, ...]
    rows: dict[int, Example]


def evaluate(arguments: EvaluateArguments, scorer: Scorer | None = None) -> dict[str, Any]:
    """
    Lets the frozen model answer with the demonstrations of every method, and reports which selection wins.

    Started by `torchrun` or `accelerate launch`, the queries are divided over the processes.

    Args:
        arguments ([`EvaluateArguments`]):
            Task, model, selectors and baselines.
        scorer ([`Scorer`], *optional*):
            A model of one's own, instead of the one that the arguments name.

    Returns:
        `dict`: what [`write_html`] shows; `report.json` is the same without the gallery.

    Raises:
        ValueError: if files and options do not fit each other, or `output_dir` holds answers of another model or task.

    Example:

    ```python
    >>> from lever_grpo.pipeline.evaluate import EvaluateArguments, evaluate
    >>> evaluation = evaluate(EvaluateArguments(selectors=["grpo=outputs/demo/grpo"]))  # doctest: +SKIP
    >>> evaluation["metrics"]["accuracy"]["2"]["paired"]["grpo_minus_random"]  # doctest: +SKIP
    {'mean': 0.43, 'ci_low': 0.36, 'ci_high': 0.5, 'p_value': 0.0001}

    ```
    """
    state = PartialState(cpu=arguments.device == "cpu" or not torch.accelerator.is_available())
    with one_run(Path(arguments.output_dir), wanted=state.is_main_process):
        return _evaluate(arguments, scorer, state)


def _evaluate(arguments: EvaluateArguments, scorer: Scorer | None, state: PartialState) -> dict[str, Any]:
    output = Path(arguments.output_dir)
    queries = load_queries(arguments)
    judges = make_judges(arguments.metrics, queries.rows.values())
    picks = {shots: make_picks(arguments, queries, shots) for shots in dict.fromkeys(arguments.num_shots)}
    ids = list(queries.dataset["query_id"])
    asked: list[Question] = sorted(
        {
            (query, tuple(shown))
            for methods in picks.values()
            for seeds in methods.values()
            for chosen in seeds
            for query, shown in zip(ids, chosen, strict=True)
        }
    )
    refuse_links(output / name for name in ("answers", "settings.json", "scorer.json"))
    if state.is_main_process and arguments.overwrite:
        shutil.rmtree(output / "answers", ignore_errors=True)
        for name in ("settings.json", "scorer.json"):
            (output / name).unlink(missing_ok=True)
    state.wait_for_everyone()
    settings = {
        "model": {f.name: getattr(arguments, f.name) for f in fields(FrozenModelArguments) if f.name not in FREE},
        "rows_sha256": rows_digest(queries.rows),
        "max_new_tokens": arguments.max_new_tokens,
    }
    what = f"output_dir={arguments.output_dir!r}"
    if state.is_main_process:
        agree(output / "settings.json", settings, what)
    missing = sorted(set(asked) - read_answers(output / "answers").keys())
    if missing and scorer is None:
        scorer = make_scorer(arguments, state)
    if scorer is not None and state.is_main_process:
        agree(output / "scorer.json", scorer.describe(), what)
    state.wait_for_everyone()
    if missing and scorer is not None:
        mine = set(ids[state.process_index :: state.num_processes])
        answer_questions(
            [question for question in asked if question[0] in mine],
            queries.rows,
            scorer,
            output / "answers",
            batch_size=arguments.batch_size,
            max_new_tokens=arguments.max_new_tokens,
            prefix=f"{state.process_index:03d}-",
            disable_tqdm=arguments.disable_tqdm or not state.is_main_process,
        )
    state.wait_for_everyone()
    evaluation = _evaluation(arguments, queries, picks, read_answers(output / "answers"), judges)
    if state.is_main_process:
        _write(evaluation, picks, ids, output)
    return evaluation


def load_queries(arguments: EvaluateArguments) -> Queries:
    """The queries of the log or of the pools, and how baselines see them."""
    rows = {row.id: row for row in load_rows(arguments)}
    sample = None
    if arguments.task_file is None and arguments.questions is None and arguments.task in list_samples():
        sample = load_sample(arguments.task)
    store = open_store(arguments)
    if store is None:
        raise ValueError("selectors and similarity see rows through embeddings: name those of the task by embeddings.")
    if arguments.candidate_pools is not None:
        dataset = given_pools(arguments.candidate_pools, rows)
    else:
        path = arguments.log or (sample and sample.heldout)
        if path is None:
            raise ValueError("the queries have no pools: name a beam log by log, or a file by candidate_pools.")
        dataset = load_beams(path)
    if arguments.num_queries is not None and arguments.num_queries < len(dataset):
        drawn = np.random.default_rng(arguments.seed).permutation(len(dataset))[: arguments.num_queries]
        dataset = dataset.select(sorted(drawn.tolist()))
    needed = {i for row in dataset for i in (row["query_id"], *row["candidate_ids"])}
    unknown = sorted(needed - rows.keys())
    if unknown:
        raise ValueError(f"rows {unknown[:5]} stand in the pools and not in the task; do both files belong together?")
    smallest = min(map(len, dataset["candidate_ids"]))
    if smallest < max(arguments.num_shots):
        raise ValueError(
            f"num_shots={arguments.num_shots}: the smallest pool has {smallest} candidates; ask for fewer shots "
            "or give larger pools."
        )
    collator, similarity = make_collator(arguments, store, sample)
    return Queries(dataset, store, collator, similarity, rows)


def given_pools(path: str, rows: Mapping[int, Example]) -> Dataset:
    """The pools of a file, without what gives the answer away: the query itself, and rows about the same thing, which
    no sampler of pools takes either."""
    source = PoolSource(path)
    pools = {query: pool for query in rows if (pool := source(query)) is not None}
    strange = sorted(set(source) - rows.keys())
    if not pools:
        raise ValueError(
            f"candidate_pools={path!r}: expected pools of rows of the task, found {len(strange)} of other queries, "
            f"{strange[:5]}; do both files belong together?"
        )
    if strange:
        logger.warning(
            "%s: %d of %d pools are of queries that are no rows of the task, and not used: %s",
            path, len(strange), len(strange) + len(pools), _some(strange),
        )  # fmt: skip

    def leaks(query: int, candidate: int) -> bool:
        about = rows[query].entity
        return candidate == query or candidate in rows and about is not None and rows[candidate].entity == about

    clean = {query: [i for i in pool if not leaks(query, i)] for query, pool in pools.items()}
    leaky = [query for query, pool in clean.items() if len(pool) < len(pools[query])]
    if leaky:
        logger.warning(
            "%s: %d pools held the query itself, or rows about the same thing, which were taken out: those of queries "
            "%s; check the candidate sampler",
            path, len(leaky), _some(leaky),
        )  # fmt: skip
    return Dataset.from_list(
        [
            {"query_id": query, "candidate_ids": pool, "sequences": [[0]], "scores": [0.0]}
            for query, pool in clean.items()
        ]
    )


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:5])) + ", …" * (len(ids) > 5)


def make_judges(metrics: Iterable[str], rows: Collection[Example]) -> dict[str, Judge]:
    """What an answer is worth, by metric; `accuracy` always, as the gallery shows it."""
    judges: dict[str, Judge] = {"accuracy": make_judge("accuracy", rows), "token_f1": token_f1}
    if "cider" in metrics:
        judges["cider"] = make_judge("cider", rows)
    return {name: judge for name, judge in judges.items() if name == "accuracy" or name in metrics}


def make_picks(arguments: EvaluateArguments, queries: Queries, num_shots: int) -> Picks:
    """What every method chooses for each query, as row ids in prompt order, for each of its seeds or draws."""
    dataset = queries.dataset
    found = {}
    for name in BASELINES if arguments.baselines is None else arguments.baselines:
        picks = baseline_picks(name, arguments, queries, num_shots)
        if picks:
            found[name] = picks
        elif arguments.baselines is not None:
            raise ValueError(
                f"baselines has {name!r}, which the data do not allow with {num_shots} shots; leave it out."
            )
    for name, paths in arguments.seeds_of.items():
        found[name] = [selector_picks(name, path, queries, num_shots) for path in paths]
    pools = list(dataset["candidate_ids"])
    return {
        name: [
            [
                [pool[i] for i in to_prompt_order([i for i in chosen if i >= 0], arguments.construct_order)]
                for pool, chosen in zip(pools, seed.tolist(), strict=True)
            ]
            for seed in seeds
        ]
        for name, seeds in found.items()
    }


def selector_picks(name: str, path: str, queries: Queries, num_shots: int) -> NDArray[np.int64]:
    """Pool positions in search order, (Q, S), that a selector chooses by the embeddings that it was trained with or,
    one with encoders of its own, by the rows."""
    selector = load_selector(path)
    collator: DataCollatorForBeams | DataCollatorForRawBeams
    if isinstance(selector, ClipSelector):
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
        collator = DataCollatorForRawBeams(list(queries.rows.values()), processor, selector.config.modalities)
    else:
        collator = selector_collator(selector.config, queries.store, f"selector {name}={path}")
    return choose(selector, queries.dataset, collator, num_shots, min_shots=1)


def selector_collator(config: SelectorConfig, store: EmbeddingStore, selector: str) -> DataCollatorForBeams:
    """Batches of what a selector reads, by the names and in the order of its config: of a wrong embedding that is as
    wide it would make picks too, and nobody would notice."""
    for side in ("query_features", "candidate_features"):
        for name, width in getattr(config, side).items():
            if store.widths.get(name) != width:
                raise ValueError(
                    f"{selector} reads {name!r} of width {width} ({side}={getattr(config, side)}), and the embeddings "
                    f"are {store.widths}; give those that it was trained with, or leave the selector out."
                )
    return DataCollatorForBeams(store, tuple(config.query_features), tuple(config.candidate_features))


def baseline_picks(
    name: str, arguments: EvaluateArguments, queries: Queries, num_shots: int
) -> list[NDArray[np.int64]]:
    """Pool positions in search order, (Q, S), for each draw of a baseline; none where the data do not allow it."""
    dataset, store, collator = queries.dataset, queries.store, queries.collator
    shared = tuple(feature for feature in collator.query_features if feature in collator.candidate_features)
    texts = tuple(feature for feature in shared if feature != "image")
    images = tuple(feature for feature in shared if feature == "image")
    if name == "zero_shot":
        return [np.zeros((len(dataset), 0), dtype=np.int64)]
    if name == "random":
        return [random_picks(dataset, num_shots, arguments.seed + draw) for draw in range(arguments.random_draws)]
    if name == "mix":
        return [mixed_picks(dataset, store, (texts[0], *images), num_shots)] if texts and images else []
    if name == "mmr":
        trade_off, features = arguments.mmr_trade_off, queries.similarity
        return [mmr_picks(dataset, store, features, num_shots, trade_off)] if features else []
    if name == "oracle":
        best = best_logged(dataset, num_shots) if arguments.candidate_pools is None else None
        return [] if best is None else [best]
    similarities = {
        "similarity": queries.similarity,
        "similarity_image": images,
        "similarity_all": shared if set(shared) != set(queries.similarity) else (),
    }
    features = similarities[name]
    return [choose(similarity_baseline(collator, features), dataset, collator, num_shots)] if features else []


def _evaluation(
    arguments: EvaluateArguments,
    queries: Queries,
    picks: Mapping[int, Picks],
    answers: Mapping[Question, Answered],
    judges: Mapping[str, Judge],
) -> dict[str, Any]:
    """Reports by metric and number of shots, and the gallery."""
    worth: dict[Question, dict[str, float]] = {
        question: {
            **{name: judge(found.text, queries.rows[question[0]].answers) for name, judge in judges.items()},
            "log_prob": found.log_prob,
        }
        for question, found in answers.items()
        if found.text is not None and found.log_prob is not None and np.isfinite(found.log_prob)
    }
    ids = list(queries.dataset["query_id"])
    asked = [  # by group: a log may have several of a query
        {(query, tuple(seed[i])) for methods in picks.values() for seeds in methods.values() for seed in seeds}
        for i, query in enumerate(ids)
    ]
    kept = [i for i, questions in enumerate(asked) if questions <= worth.keys()]
    notes = []
    if len(kept) < len(ids):
        failed = [query for i, query in enumerate(ids) if i not in set(kept)]
        notes.append(
            f"{len(failed)} of {len(ids)} queries are left out for all methods, as the model could not be asked about "
            f"all of their prompts: {failed[:10]}{' …' * (len(failed) > 10)}."
        )
        logger.warning("%s", notes[-1])
    if not kept:
        raise ValueError("the model could be asked about no query with the demonstrations of all methods; see above.")
    task = Path(arguments.task_file or arguments.questions or arguments.task).stem
    settings: dict[str, Any] = {"task": task, "queries": len(kept)}
    metrics: dict[str, Any] = {}
    for metric in arguments.metrics:
        metrics[metric] = {}
        for shots, methods in picks.items():
            results = []
            for name, seeds in methods.items():
                rewards = np.array([[worth[ids[i], tuple(seed[i])][metric] for i in kept] for seed in seeds])
                if name == "random":  # draws are no seeds: what is compared is their mean
                    rewards = rewards.mean(axis=0, keepdims=True)
                results.append(stack_seeds([MethodResult(name, row) for row in rewards]))
            metrics[metric][str(shots)] = build_report(
                results,
                title=f"{task}: {shots} shot{'s' * (shots > 1)}",
                reward_name=METRICS[metric],
                settings=settings,
                sections={"Notes": "\n".join(notes)} if notes else None,
            )
    title = f"{task}: answers with the chosen demonstrations"
    shown = kept[: arguments.gallery_queries]
    chosen = {j for i in shown for methods in picks.values() for seeds in methods.values() for j in seeds[0][i]}
    broken = broken_images(queries.rows[i] for i in sorted(chosen | {ids[i] for i in shown}))
    if broken:  # a text model has answered all the same: the page goes without them
        notes.append(f"images of {len(broken)} rows cannot be read and are not shown: {_some(list(broken))}.")
        logger.warning("%s The first: %s", notes[-1], next(iter(broken.values())))
    gallery = _gallery(queries, picks, answers, worth, shown, broken)
    settings |= {"random_draws": arguments.random_draws, "seed": arguments.seed, "selectors": arguments.selectors}
    return {"title": title, "settings": settings, "notes": notes, "metrics": metrics, "gallery": gallery}


def broken_images(rows: Iterable[Example]) -> dict[int, str]:
    """Why images cannot be shown, by row id."""
    reasons = {}
    for row in rows:
        if row.image is not None:
            try:
                image_uri(row.image)
            except (OSError, ValueError) as error:
                reasons[row.id] = str(error)
    return reasons


def _gallery(
    queries: Queries,
    picks: Mapping[int, Picks],
    answers: Mapping[Question, Answered],
    worth: Mapping[Question, Mapping[str, Any]],
    shown: list[int],
    broken: Collection[int],
) -> list[dict[str, Any]]:
    """Queries with what each method chose (the first seed's or draw's choice) and what the model made of it; rows of
    `broken` have no image."""
    ids = list(queries.dataset["query_id"])

    def image(row: Example) -> Path | bytes | None:
        return None if row.id in broken else row.image

    def about(row: Example) -> dict[str, Any]:
        return {"id": row.id, "question": row.question, "answer": row.answers[0], "image": image(row)}

    gallery = []
    for i in shown:
        row = queries.rows[ids[i]]
        chosen: dict[str, Any] = {}
        for shots, methods in picks.items():
            chosen[str(shots)] = {}
            for name, seeds in methods.items():
                question = (ids[i], tuple(seeds[0][i]))
                chosen[str(shots)][name] = {
                    "demonstrations": [about(queries.rows[j]) for j in seeds[0][i]],
                    "answer": answers[question].text,
                    **worth[question],
                }
        gallery.append(
            {"query_id": row.id, "question": row.question, "answers": list(row.answers), "image": image(row)}
            | {"picks": chosen}
        )
    return gallery


def _write(evaluation: dict[str, Any], picks: Mapping[int, Picks], ids: list[int], output: Path) -> None:
    """The reports onto the disk and the console."""
    for metric, by_shots in evaluation["metrics"].items():
        for shots, report in by_shots.items():
            write_report(report, output / metric / f"shots{shots}")
            print_report(report)
    with atomic_file(output / "picks.json") as stream:
        stream.write(orjson.dumps({"query_ids": ids, "shots": {str(shots): p for shots, p in picks.items()}}))
    with atomic_file(output / "report.json") as stream:
        summary = {name: value for name, value in evaluation.items() if name != "gallery"}
        stream.write(orjson.dumps(summary, option=orjson.OPT_INDENT_2) + b"\n")
    write_html(evaluation, output / "report.html")
