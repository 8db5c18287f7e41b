"""The frozen model's answers to prompts, each asked once and kept, so that a run that was stopped goes on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from tqdm.auto import tqdm

from ..atomic import atomic_file
from ..data.examples import Example
from ..scorers import Prompt, Scorer
from ..scorers.scores import mean_log_prob


Question = tuple[int, tuple[int, ...]]  # row ids: the query, and its demonstrations in prompt order


@dataclass(frozen=True)
class Answered:
    """
    What the model made of a prompt.

    Args:
        text (`str`, *optional*):
            Its answer; `None` if it could not be asked.
        log_prob (`float`, *optional*):
            Mean log-probability of the tokens of the query's first answer; `None` if it could not be asked.
    """

    text: str | None
    log_prob: float | None


def read_answers(folder: str | Path) -> dict[Question, Answered]:
    """All answers that are kept in a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            record = orjson.loads(line)
            key = (record["query_id"], tuple(record["demonstrations"]))
            found[key] = Answered(record["answer"], record["log_prob"])
    return found


def next_number(folder: Path, prefix: str) -> int:
    """That of the next file of a process: above all that are there, of which some may have been deleted."""
    numbers = (path.stem.removeprefix(prefix) for path in folder.glob(f"{prefix}*.jsonl"))
    return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def answer_questions(
    questions: Iterable[Question],
    rows: Mapping[int, Example],
    scorer: Scorer,
    folder: str | Path,
    *,
    batch_size: int = 256,
    max_new_tokens: int = 10,
    prefix: str = "",
    disable_tqdm: bool = False,
) -> None:
    """
    Asks what is not yet answered in a folder; each batch is a file that is there as a whole or not at all.

    Args:
        questions (`Iterable[tuple[int, tuple[int, ...]]]`):
            Row ids of queries and of their demonstrations in prompt order; what comes twice is asked once.
        rows (`Mapping[int, Example]`):
            The rows.
        scorer ([`Scorer`]):
            The frozen model.
        folder (`str` or `Path`):
            Where answers are kept, for [`read_answers`]. One folder belongs to one model, prompt and task.
        batch_size (`int`, *optional*, defaults to `256`):
            Prompts of a file: what a kill costs at most.
        max_new_tokens (`int`, *optional*, defaults to `10`):
            Longest answer, in tokens.
        prefix (`str`, *optional*):
            Of file names, different in each process that writes to the folder at once.
        disable_tqdm (`bool`, *optional*, defaults to `False`):
            No progress bar.

    Example:

    ```python
    >>> import tempfile
    >>> import numpy as np
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.inference.answering import answer_questions, read_answers
    >>> class Parrot:
    ...     def score(self, prompts):
    ...         return [np.array([-1.0])] * len(prompts)
    ...     def answer(self, prompts, max_new_tokens=10):
    ...         return [prompt.demonstrations[-1].answers[0] for prompt in prompts]
    >>> rows = {i: Example(i, f"{i}?", (str(i),)) for i in range(3)}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     answer_questions([(0, (1, 2)), (0, (2, 1))], rows, Parrot(), folder, disable_tqdm=True)
    ...     read_answers(folder)[0, (1, 2)]
    Answered(text='2', log_prob=-1.0)

    ```
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = read_answers(folder)
    new = [question for question in dict.fromkeys(questions) if question not in known]
    number = next_number(folder, prefix)
    with tqdm(total=len(new), unit=" prompts", desc="answers", disable=disable_tqdm) as progress:
        for start in range(0, len(new), batch_size):
            batch = new[start : start + batch_size]
            prompts = [Prompt(rows[query], tuple(rows[i] for i in shown)) for query, shown in batch]
            scores, answers = scorer.score(prompts), scorer.answer(prompts, max_new_tokens)
            records: list[dict[str, Any]] = [
                {
                    "query_id": query,
                    "demonstrations": list(shown),
                    "answer": answer,
                    "log_prob": None if score is None else mean_log_prob(score),
                }
                for (query, shown), score, answer in zip(batch, scores, answers, strict=True)
            ]
            with atomic_file(folder / f"{prefix}{number:05d}.jsonl") as stream:
                stream.writelines(orjson.dumps(record) + b"\n" for record in records)
            number += 1
            progress.update(len(batch))
