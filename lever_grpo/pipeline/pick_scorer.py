"""What the frozen model says of sequences that a log does not hold, asked as the log was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import orjson
import torch
from accelerate import PartialState

from ..atomic import atomic_file
from ..data.examples import Example
from ..data.orders import to_prompt_order
from ..data.readers import local_files
from ..hub.logs import MANIFEST_FILE
from ..inference.answering import Question, next_number
from ..scorers import Prompt, Scorer
from ..scorers.scores import mean_log_prob
from ..search import SearchConfig
from ..search.beam_search import ABSOLUTE, unusable
from .frozen_model import load_rows, make_scorer
from .generate_arguments import GenerateArguments
from .generate_folder import agree, model_digest, rows_digest


NEWER = ("transformers", "torch", "server_version")  # of a model's description: what may be newer than the log


class PickScorer:
    """
    Scores of sequences by the frozen model that made a log, in the log's units: `score_picks` of the trainers. A
    process asks about a sequence once, and has the model in its memory, on the device that is the default there.

    Args:
        log (`str` or `Path`):
            A log of `lever-grpo generate`, with its `manifest.json` beside it. Paths that it names are as they were
            given then.
        pools (`dict[int, list[int]]`):
            Row ids of each query's candidates.
        scorer ([`Scorer`], *optional*):
            The model, instead of the one that the manifest names, which is loaded when it is first needed.

    Raises:
        ValueError: if there is no manifest, it does not say how the log was made, or rows or model are not those that
            the log was made with.
    """

    def __init__(self, log: str | Path, pools: Mapping[int, Sequence[int]], scorer: Scorer | None = None):
        files = local_files(log)
        if len(files) != 1:
            raise ValueError(f"score_picks: {log} is {len(files)} files, and picks are scored as one log was made.")
        self.manifest = Path(files[0]).parent / MANIFEST_FILE
        self.arguments, self.made_with = self._read_manifest()
        self.config: SearchConfig = self.arguments.search
        self.pools = pools
        try:
            self.rows: dict[int, Example] = {row.id: row for row in load_rows(self.arguments)}
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.manifest} names rows that cannot be read: {error}") from error
        self._scorer, self._checked = scorer, False
        self._known: dict[Question, float] = {}
        self._folder: Path | None = None

    def keep_in(self, folder: Path) -> None:
        """Keeps what is asked from now on in a folder, and knows what an earlier run left there: a run that goes on
        then finds the same scores."""
        if folder == self._folder:
            return
        self._folder = folder
        if folder.exists():
            self._agree(folder)
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                record = orjson.loads(line)
                score = record["log_prob"]
                key = (record["query_id"], tuple(record["demonstrations"]))
                self._known[key] = math.nan if score is None else score

    def _agree(self, folder: Path) -> None:
        """One folder belongs to one model and its rows."""
        agree(folder / "scorer.json", self.made_with, str(self.manifest))

    def __call__(self, query_ids: Sequence[int], picks: Sequence[Sequence[int]]) -> list[float]:
        """
        The score of a sequence for each query.

        Args:
            query_ids (`list[int]`):
                The queries.
            picks (`list[list[int]]`):
                Pool positions of each, in search order.

        Returns:
            `list[float]`: NaN where the model has no usable score of a prompt, as one that is too long.

        Raises:
            ScorerError: if the model itself fails.
        """
        asked: list[Question] = []
        for query, pick in zip(query_ids, picks, strict=True):
            shown = [self.pools[query][position] for position in pick]
            asked.append((query, tuple(to_prompt_order(shown, self.config.construct_order))))
        if self.config.score == ABSOLUTE:
            self._ask(asked)
            return [self._known[question] for question in asked]
        self._ask([*asked, *((query, ()) for query in query_ids)])
        return [self.config.gain(self._known[question], self._known[question[0], ()]) for question in asked]

    def _ask(self, asked: Sequence[Question]) -> None:
        """The mean log-probability of what is not known yet."""
        new = [question for question in dict.fromkeys(asked) if question not in self._known]
        if not new:
            return
        prompts = [Prompt(self.rows[query], tuple(self.rows[i] for i in shown)) for query, shown in new]
        scores = self._model().score(prompts)
        found = {
            question: math.nan if score is None or unusable(score) else mean_log_prob(score)
            for question, score in zip(new, scores, strict=True)
        }
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._agree(self._folder)
            prefix = f"{PartialState().process_index}-"
            with atomic_file(self._folder / f"{prefix}{next_number(self._folder, prefix):05d}.jsonl") as stream:
                for (query, shown), score in found.items():  # a NaN becomes null
                    record = {"query_id": query, "demonstrations": shown, "log_prob": score}
                    stream.write(orjson.dumps(record) + b"\n")
        self._known.update(found)

    def _model(self) -> Scorer:
        if self._scorer is None:
            with torch.random.fork_rng(devices=[]):  # loading draws weights, and training must not notice when it was
                self._scorer = make_scorer(self.arguments, PartialState())
        if not self._checked:
            here: dict[str, Any] = {**self._scorer.describe(), "rows_sha256": rows_digest(self.rows)}
            if "model_files" in self.made_with:
                here["model_files"] = model_digest(Path(str(self.arguments.model)), self.arguments.gguf_file)
            here = orjson.loads(orjson.dumps(here))
            differ = [n for n, value in self.made_with.items() if here.get(n) != value and n not in NEWER]
            if differ:
                shown = "; ".join(f"{n}: {self.made_with[n]!r} there, {here.get(n)!r} here" for n in differ)
                raise ValueError(
                    f"{self.manifest}: what is to score picks is not what made the log ({shown}); use the same model "
                    "and rows, or leave score_picks out."
                )
            self._checked = True
        return self._scorer

    def _read_manifest(self) -> tuple[GenerateArguments, dict[str, Any]]:
        """How the log was made, and what with."""
        try:
            about = orjson.loads(self.manifest.read_bytes())
            unknown = sorted(about["arguments"].keys() - {field.name for field in fields(GenerateArguments)})
            if unknown:
                raise ValueError(f"the argument {unknown[0]!r} is unknown here")
            arguments = replace(GenerateArguments(**about["arguments"]), device=None)  # that of the log's machine
            inputs = about["inputs"]
            made_with = {**about["scorer"], "rows_sha256": inputs["rows_sha256"]}
            return arguments, made_with | ({"model_files": inputs["model"]} if "model" in inputs else {})
        except FileNotFoundError as error:
            raise ValueError(
                f"score_picks needs {self.manifest}, which says how the validation log was made, and it is not there: "
                "keep it beside the log that `lever-grpo generate` wrote, or leave score_picks out."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.manifest}: expected the manifest of a log that `lever-grpo generate` wrote, with 'arguments', "
                f"'inputs' and 'scorer' ({error!r}); make the log anew, or leave score_picks out."
            ) from error
