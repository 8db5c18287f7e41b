"""The packaged sample: four small tasks, scored by a real language model. See `sample/README.md`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .beam_json import load_beams
from .embeddings import EmbeddingStore


SAMPLE_FOLDER = Path(__file__).resolve().parents[1] / "sample"
_TEXT = ("question", "question_answer", "answer")
# what the query side and the candidate side see, and what the search ranked its pools by; the rest of the folder
# speaks for itself
_FEATURES: dict[str, tuple[tuple[str, ...], ...]] = {
    "supersense": (("question", "hidden"), ("question", "answer", "hidden"), ("question",)),
    "emoji": (("question", "image", "hidden"), (*_TEXT, "image", "hidden"), ("question",)),
    "country_facts": (("question", "hidden"), (*_TEXT, "hidden"), ("question",)),
    "easy_vqa": (("question", "image"), ("question", "answer", "image"), ("question", "image")),
}


@dataclass(frozen=True)
class SampleTask:
    """One task of the sample.

    Attributes:
        name (`str`): Name of the task.
        folder (`Path`): Where its files are.
        query_features, candidate_features (`tuple[str, ...]`): Embeddings that each side sees, for
        `DataCollatorForBeams`.
        similarity_features (`tuple[str, ...]`): Embeddings by which the search ranked its pools, nearest first: those
        of the similarity baseline.

    Example:

    ```python
    >>> from lever_grpo.data import load_sample
    >>> task = load_sample("emoji")
    >>> sorted(task.splits), task.query_features, task.similarity_features
    (['heldout', 'train', 'validation'], ('question', 'image', 'hidden'), ('question',))

    ```
    """

    name: str
    folder: Path
    query_features: tuple[str, ...]
    candidate_features: tuple[str, ...]
    similarity_features: tuple[str, ...]

    @property
    def splits(self) -> dict[str, Path]:
        """Path of each split's beam log. `validation` is not there for every task."""
        paths = {name: self.folder / f"{name}.parquet" for name in ("train", "validation", "heldout")}
        return {name: path for name, path in paths.items() if path.exists()}

    @property
    def train(self) -> Path:
        """Beam log of the training queries: every single, pairs that extend the best, in some tasks also others."""
        return self.folder / "train.parquet"

    @property
    def heldout(self) -> Path:
        """Beam log of the held-out queries: every single and every ordered pair of the pool."""
        return self.folder / "heldout.parquet"

    @property
    def validation(self) -> Path | None:
        """Beam log of validation queries, scored like the held-out ones; None where the task has none."""
        return self.splits.get("validation")

    def load(self, split: str, shots: int | Sequence[int] | None = None, **options: Any) -> Any:
        """Groups of a split, by [`load_beams`] with the same options."""
        if split not in self.splits:
            raise ValueError(f"task '{self.name}' has the splits {sorted(self.splits)}, got {split!r}")
        return load_beams(self.splits[split], shots=shots, **options)

    @cached_property
    def store(self) -> EmbeddingStore:
        """Embeddings of all rows of the task."""
        return EmbeddingStore.from_safetensors(self.folder / "embeddings.safetensors")

    def rows(self) -> list[dict[str, Any]]:
        """Question, answer and, where they have one, image and entity of all rows; positions are row ids."""
        return pq.read_table(self.folder / "rows.parquet").to_pylist()

    def entities(self) -> dict[int, str]:
        """What each row is about, for `split_by_query` and `drop_candidates`: its country or image; else empty."""
        return {row["id"]: row["entity"] for row in self.rows() if "entity" in row}


def list_samples() -> list[str]:
    """Names of the packaged tasks.

    Example:

    ```python
    >>> from lever_grpo.data import list_samples
    >>> list_samples()
    ['supersense', 'emoji', 'country_facts', 'easy_vqa']

    ```
    """
    return list(_FEATURES)


def load_sample(task: str = "emoji") -> SampleTask:
    """A packaged task by name.

    Example:

    ```python
    >>> from lever_grpo.data import load_sample
    >>> load_sample("country_facts").store.widths
    {'answer': 384, 'hidden': 256, 'question': 384, 'question_answer': 384}

    ```
    """
    if task not in _FEATURES:
        raise ValueError(f"task must be one of {list_samples()}, got {task!r}")
    folder = SAMPLE_FOLDER / task
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: expected the packaged sample, found nothing; is the package's data installed?"
        )
    return SampleTask(task, folder, *_FEATURES[task])
