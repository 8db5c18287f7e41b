"""What the frozen model says of sequences that a log does not hold, asked as the log was made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import orjson
from accelerate import PartialState

from ..atomic import atomic_file
from ..data.examples import Example
from ..data.orders import to_prompt_order
from ..scorers import Prompt, Scorer
from ..scorers.scores import mean_log_prob
from ..search import SearchConfig
from .frozen_model import load_rows, make_scorer
from .generate_arguments import GenerateArguments


MANIFEST = "manifest.json"
VERSIONS = ("transformers", "torch")  # of a model's description: they may be newer than when the log was made
Asked = tuple[int, tuple[int, ...]]  # row ids: the query, and demonstrations in search order


class PickScorer:
    """
    Scores of sequences by the frozen model that made a log, in the log's units: `score_picks` of the trainers. Each
    sequence is asked about once.

    Args:
        log (`str` or `Path`):
            A log of `lever-grpo generate`, with its `manifest.json` beside it.
        pools (`dict[int, list[int]]`):
            Row ids of each query's candidates.
        scorer ([`Scorer`], *optional*):
            The model, instead of the one that the manifest names, which is loaded when it is first needed.

    Raises:
        ValueError: if there is no manifest, it does not say how the log was made, or the model is not that of the log.
    """

    def __init__(
        self,
        log: str | Path,
        pools: Mapping[int, Sequence[int]],
        scorer: Scorer | None = None,
    ):
        self.manifest = Path(log).parent / MANIFEST
        self.pools = pools
        about = self._read_manifest()
        self.arguments, self.described = about["arguments"], about["scorer"]
        self.config: SearchConfig = self.arguments.search
        self.rows: dict[int, Example] = {row.id: row for row in load_rows(self.arguments)}
        self._scorer, self._checked = scorer, False
        self._known: dict[Asked, float] = {}
        self._folder: Path | None = None

    def keep_in(self, folder: Path) -> None:
        """Keeps what is asked from now on in a folder, and knows what an earlier run left there: a run that goes on
        then finds the same scores."""
        self._folder = folder
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                record = orjson.loads(line)
                score = record["log_prob"]
                key = (record["query_id"], tuple(record["demonstrations"]))
                self._known[key] = math.nan if score is None else score

    def __call__(self, query_ids: Sequence[int], picks: Sequence[Sequence[int]]) -> list[float]:
        """The score of a sequence of pool positions, in search order, for each query; NaN where the model could not be
        asked."""
        asked = [
            (query, tuple(self.pools[query][position] for position in pick))
            for query, pick in zip(query_ids, picks, strict=True)
        ]
        absolute = self.config.score == "log_prob"
        means = self._means(asked if absolute else [*asked, *((query, ()) for query in query_ids)])
        return [means[key] if absolute else self.config.gain(means[key], means[key[0], ()]) for key in asked]

    def _means(self, asked: Sequence[Asked]) -> dict[Asked, float]:
        new = [key for key in dict.fromkeys(asked) if key not in self._known]
        if new:
            prompts = [
                Prompt(
                    self.rows[query],
                    tuple(self.rows[i] for i in to_prompt_order(shown, self.config.construct_order)),
                )
                for query, shown in new
            ]
            scores = self._model().score(prompts)
            values = [math.nan if score is None else mean_log_prob(score) for score in scores]
            found = {key: value if math.isfinite(value) else math.nan for key, value in zip(new, values, strict=True)}
            self._write(found)
            self._known.update(found)
        return self._known

    def _model(self) -> Scorer:
        if self._scorer is None:
            self._scorer = make_scorer(self.arguments, PartialState())
        if not self._checked:
            here = orjson.loads(orjson.dumps(self._scorer.describe()))
            differ = [n for n, value in self.described.items() if here.get(n) != value and n not in VERSIONS]
            if differ:
                shown = "; ".join(f"{n}: {self.described[n]!r} there, {here.get(n)!r} here" for n in differ)
                raise ValueError(
                    f"{self.manifest}: the model that is to score picks is not the one that made the log ({shown}); "
                    "give it the same model, or leave score_picks out."
                )
            self._checked = True
        return self._scorer

    def _read_manifest(self) -> dict[str, Any]:
        try:
            about = orjson.loads(self.manifest.read_bytes())
            known = {field.name for field in fields(GenerateArguments)}
            arguments = {name: value for name, value in about["arguments"].items() if name in known}
            return {"arguments": GenerateArguments(**arguments), "scorer": dict(about["scorer"])}
        except FileNotFoundError as error:
            raise ValueError(
                f"score_picks needs {self.manifest}, which says how the validation log was made, and it is not there: "
                "keep it beside the log that `lever-grpo generate` wrote, or leave score_picks out."
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{self.manifest}: expected the manifest of a log that `lever-grpo generate` wrote, with 'arguments' "
                f"and 'scorer' ({error!r}); make the log anew, or leave score_picks out."
            ) from error

    def _write(self, found: Mapping[Asked, float]) -> None:
        if self._folder is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        prefix = f"{PartialState().process_index}-"  # each process asks about queries of its own
        path = self._folder / f"{prefix}{len(list(self._folder.glob(f'{prefix}*.jsonl'))):05d}.jsonl"
        with atomic_file(path) as stream:
            for (query, shown), score in found.items():  # a NaN becomes null
                stream.write(orjson.dumps({"query_id": query, "demonstrations": shown, "log_prob": score}) + b"\n")
