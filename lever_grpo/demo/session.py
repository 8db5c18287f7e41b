"""What the page says about a query: its pool, what each method picks of it, how probable that is, what is answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from ..data import DataCollatorForBeams, DataCollatorForRawBeams, EmbeddingStore, load_sample, to_prompt_order
from ..data.examples import Example
from ..inference import DemonstrationSelector, choose
from ..inference.choices import FORWARD_INPUTS, policy_inputs
from ..models import ClipSelector, SelectorModel
from ..pipeline.evaluate import Queries, baseline_picks, load_queries, selector_collator
from ..pipeline.evaluate_arguments import BASELINES, EvaluateArguments
from ..pipeline.runs import similarity_baseline
from ..report.results import method_order
from ..scorers import Prompt, Scorer
from ..scorers.scores import mean_log_prob
from ..search import make_judge
from ..search.features import load_encoders
from ..search.judges import Judge


SAME = 0.99  # cosine of an embedding that is made again to the stored one, which is rounded


@dataclass(frozen=True)
class Choice:
    """
    What a method picked, and what came of it.

    Args:
        method (`str`):
            Its name.
        picks (`tuple[int, ...]`):
            Pool positions, first pick first.
        demonstrations (`tuple[Example, ...]`):
            The same rows in the order of the prompt: the last one stands next to the query.
        log_probs (`dict[str, tuple[float, ...]]`):
            By selector: the log-probability of each of these picks under it, in nats, whoever made them. One that may
            stop has one more value, that of stopping there, unless the sequence is as long as it may be.
        answer (`str`, *optional*):
            What the frozen model answered; `None` without a model, or if it could not be asked.
        accuracy (`float`, *optional*), answer_log_prob (`float`, *optional*):
            Whether that is right, and the mean log-probability of the right answer's tokens; `None` where the right
            answer is not known.
    """

    method: str
    picks: tuple[int, ...]
    demonstrations: tuple[Example, ...]
    log_probs: Mapping[str, tuple[float, ...]]
    answer: str | None = None
    accuracy: float | None = None
    answer_log_prob: float | None = None


@dataclass(frozen=True)
class Shown:
    """
    A query with the choices of all methods.

    Args:
        query ([`Example`]), answer_known (`bool`):
            The query, and whether its answers are the right ones (those of a typed query are not known).
        pool (`tuple[Example, ...]`):
            Its candidates.
        first (`dict[str, tuple[float, ...]]`):
            By selector: the log-probability of each candidate as the first pick, in nats.
        choices (`tuple[Choice, ...]`):
            One a method.
    """

    query: Example
    answer_known: bool
    pool: tuple[Example, ...]
    first: Mapping[str, tuple[float, ...]]
    choices: tuple[Choice, ...]


class Session:
    """
    Selectors, baselines and a frozen model on a task, to be asked about one query after another.

    Args:
        arguments ([`EvaluateArguments`]):
            Task, selectors and baselines.
        scorer ([`Scorer`], *optional*):
            The frozen model. Without it nothing is answered.

    Attributes:
        no_typed_queries (`str`, *optional*): Why queries cannot be typed, or `None` if they can.

    Raises:
        ValueError: if files, options and selectors do not fit each other.

    Example:

    ```python
    >>> from lever_grpo.demo import DemoArguments, Session
    >>> session = Session(DemoArguments(task="country_facts"))
    >>> shown = session.held_out(session.query_ids[0], num_shots=2)
    >>> [choice.method for choice in shown.choices], len(shown.pool)
    (['random', 'similarity'], 16)

    ```
    """

    def __init__(self, arguments: EvaluateArguments, scorer: Scorer | None = None):
        self.arguments, self.scorer = arguments, scorer
        self.queries = load_queries(arguments)
        self._judge = make_judge("accuracy", self.queries.rows.values())
        loaded = {name: DemonstrationSelector.from_pretrained(paths[0]) for name, paths in arguments.seeds_of.items()}
        self.selectors: dict[str, SelectorModel] = {name: picker.selector for name, picker in loaded.items()}
        self._processors = {name: picker.processor for name, picker in loaded.items()}
        self._place = {query: i for i, query in enumerate(self.queries.dataset["query_id"])}
        self._choices(self._query(self.query_ids[0]), max(arguments.num_shots))  # what does not fit is named at once
        self._retriever: DemonstrationSelector | None = None
        self.no_typed_queries: str | None = None
        try:
            self._retriever = self._make_retriever([(picker.encoders, picker.maps) for picker in loaded.values()])
        except (ImportError, OSError, ValueError) as error:
            self.no_typed_queries = str(error)

    @property
    def query_ids(self) -> list[int]:
        """Row ids of the held-out queries."""
        return list(self._place)

    @property
    def sees_images(self) -> bool:
        """Whether a typed query may come with an image."""
        encoders = () if self._retriever is None else self._retriever.encoders.values()
        return any(encoder.kind == "image" for encoder in encoders) or any(
            row.image is not None for row in self.queries.rows.values()
        )

    def held_out(self, query_id: int, num_shots: int) -> Shown:
        """
        A query of the log.

        Raises:
            ValueError: if there is no such query, or its pool is too small.
        """
        if query_id not in self._place:
            raise ValueError(f"query_id={query_id}: the log has no such query; pick one of those that it has.")
        return self._shown(self._query(query_id), num_shots, answer_known=True)

    def typed(self, question: str, num_shots: int, image: Path | bytes | None = None) -> Shown:
        """
        A query that is not in the log. Its pool are the candidates of all pools that are nearest to it, as many as the
        log's largest pool has.

        Args:
            question (`str`):
                The question.
            num_shots (`int`):
                Number of demonstrations.
            image (`Path` or `bytes`, *optional*):
                The image that it is about.

        Raises:
            ValueError: if queries cannot be typed, the question is blank, or an image is missing.
        """
        if self._retriever is None:
            raise ValueError(f"queries cannot be typed: {self.no_typed_queries}")
        if not question.strip():
            raise ValueError("the question is blank: type one.")
        queries, collator = self.queries, self.queries.collator
        query = Example(len(queries.store), question.strip(), ("?",), image)
        made = {name: self._retriever.encode(name, [query]) for name in self._widths("query")}
        pool_size = max(map(len, queries.dataset["candidate_ids"]))
        (nearest,) = self._retriever.select([query], 1, pool_size=pool_size, embeddings=EmbeddingStore(made))
        # rows of their own: the query is row 0, its pool follows; what only candidates are seen by is 0 for the query
        ids = [row.id for row in nearest.pool]
        rows = [query, *nearest.pool]
        arrays = {}
        for name, width in (self._widths("query") | self._widths("candidate")).items():
            asked = made.get(name, np.zeros((1, width), np.float32))
            arrays[name] = np.concatenate([asked, queries.store.gather(ids, [name])])
        store = EmbeddingStore(arrays)
        pool = list(range(1, len(rows)))
        dataset = Dataset.from_list([{"query_id": 0, "candidate_ids": pool, "sequences": [], "scores": []}])
        one = Queries(dataset, store, replace(collator, store=store), queries.similarity, dict(enumerate(rows)))
        return self._shown(one, num_shots, answer_known=False)

    def _widths(self, side: str) -> dict[str, int]:
        """Names and widths of the embeddings that baselines and selectors see of a query, or of a candidate."""
        seen = [getattr(self.queries.collator, f"{side}_widths")]
        for selector in self.selectors.values():
            if not isinstance(selector, ClipSelector):
                seen.append(getattr(selector.config, f"{side}_features"))
        return {name: width for features in seen for name, width in features.items()}

    def _query(self, query_id: int) -> Queries:
        return replace(self.queries, dataset=self.queries.dataset.select([self._place[query_id]]))

    def _shown(self, one: Queries, num_shots: int, answer_known: bool) -> Shown:
        (group,) = one.dataset
        query, pool = one.rows[group["query_id"]], tuple(one.rows[i] for i in group["candidate_ids"])
        if not 1 <= num_shots <= len(pool):
            raise ValueError(f"num_shots={num_shots} must be from 1 to {len(pool)}, the number of candidates.")
        choices = self._choices(one, num_shots)
        log_probs, first = self._log_probs(one, list(choices.values()))
        shown = [
            Choice(
                method,
                tuple(picks),
                tuple(pool[i] for i in to_prompt_order(picks, self.arguments.construct_order)),
                {name: values[i] for name, values in log_probs.items()},
            )
            for i, (method, picks) in enumerate(choices.items())
        ]
        if self.scorer is not None:
            judge = self._judge if answer_known else None
            shown = _answered(shown, query, self.scorer, self.arguments.max_new_tokens, judge)
        return Shown(query, answer_known, pool, first, tuple(shown))

    def _choices(self, one: Queries, num_shots: int) -> dict[str, list[int]]:
        """What every method picks for one query, as pool positions in search order."""
        found = {}
        for name in BASELINES if self.arguments.baselines is None else self.arguments.baselines:
            draws = baseline_picks(name, self.arguments, one, num_shots)
            if draws:  # none where the data do not allow it, e.g. the best of the log for a typed query
                found[name] = draws[0]
        for name, selector in self.selectors.items():
            found[name] = choose(selector, one.dataset, self._collator(name, one), num_shots, min_shots=1)
        return {name: [i for i in found[name][0].tolist() if i >= 0] for name in method_order(list(found))}

    @torch.no_grad()
    def _log_probs(
        self, one: Queries, choices: list[list[int]]
    ) -> tuple[dict[str, list[tuple[float, ...]]], dict[str, tuple[float, ...]]]:
        """By selector: log-probabilities of the steps of each choice; of each candidate as the first pick."""
        (group,) = one.dataset
        # a choice of one candidate is put in front, so that there is a first step whatever was chosen
        sequences = [[0], *choices]
        row = {name: group[name] for name in ("query_id", "candidate_ids")} | {"sequences": sequences}
        steps, first = {}, {}
        for name, selector in self.selectors.items():
            batch = self._collator(name, one)([row | {"scores": [0.0] * len(sequences)}])
            out: Any = selector(**policy_inputs(batch, FORWARD_INPUTS, selector), return_step_log_probs=True)
            taken = zip(out.log_probs[0], out.step_mask[0], strict=True)
            steps[name] = [tuple(values[mask].tolist()) for values, mask in taken][1:]
            first[name] = tuple(out.step_log_probs[0, 0, 0, : len(group["candidate_ids"])].tolist())
        return steps, first

    def _collator(self, name: str, one: Queries) -> DataCollatorForBeams | DataCollatorForRawBeams:
        """How a selector sees one query and its pool: by embeddings or, one with encoders of its own, by the rows."""
        selector = self.selectors[name]
        if not isinstance(selector, ClipSelector):
            return selector_collator(selector.config, one.store, f"selector {name}")
        (group,) = one.dataset
        # the ids are those of the group; a typed query and its pool are numbered anew
        rows = [replace(one.rows[i], id=i) for i in (group["query_id"], *group["candidate_ids"])]
        return DataCollatorForRawBeams(rows, self._processors[name], selector.config.modalities)

    def _make_retriever(self, found: Sequence[tuple[Mapping, Mapping]]) -> DemonstrationSelector:
        """Encoders of queries with the candidates of all pools; an error says why there are none."""
        queries, collator = self.queries, self.queries.collator
        if self.arguments.embeddings is not None:
            place = Path(self.arguments.embeddings)
        else:  # no others have been opened
            place = load_sample(self.arguments.task).folder
        needed = list(self._widths("query"))
        sources = [*found, load_encoders(place if place.is_dir() else place.parent)]
        fitting = [source for source in sources if set(needed) <= source[0].keys()]
        if not fitting:
            raise ValueError(
                f"neither a selector nor the task says how {', '.join(needed)} are made of rows (encoders.json)."
            )
        encoders, maps = fitting[0]
        nearest = similarity_baseline(collator, queries.similarity)
        retriever = DemonstrationSelector(nearest, encoders, maps, self.arguments.construct_order)
        for name in needed:
            known = queries.store.gather(self.query_ids[:1], [name])[0]
            again = retriever.encode(name, [queries.rows[self.query_ids[0]]])[0]
            if again.shape != known.shape or _cosine(again, known) < SAME:
                raise ValueError(
                    f"the encoder of {name} makes other embeddings than the task's; is encoders.json of this task?"
                )
        candidates = sorted({i for pool in queries.dataset["candidate_ids"] for i in pool})
        vectors = {name: queries.store.gather(candidates, [name]) for name in collator.candidate_features}
        retriever.set_candidates([queries.rows[i] for i in candidates], EmbeddingStore(vectors))
        return retriever


def _answered(
    choices: list[Choice], query: Example, scorer: Scorer, max_new_tokens: int, judge: Judge | None
) -> list[Choice]:
    """The choices with what the model answers to each; a prompt that several share is asked once. Without a judge the
    query has no right answer."""
    prompts = list(dict.fromkeys(Prompt(query, choice.demonstrations) for choice in choices))
    scores = dict(zip(prompts, scorer.score(prompts), strict=True)) if judge is not None else {}
    said = dict(zip(prompts, scorer.answer(prompts, max_new_tokens), strict=True))
    answered = []
    for choice in choices:
        prompt = Prompt(query, choice.demonstrations)
        text, score = said[prompt], scores.get(prompt)
        answered.append(
            replace(
                choice,
                answer=text,
                accuracy=judge(text, query.answers) if judge is not None and text is not None else None,
                answer_log_prob=None if score is None else mean_log_prob(score),
            )
        )
    return answered


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))
