"""Groups of a dataset and raw rows of a task to one padded batch: images and texts in the place of embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .collator import collate_groups
from .examples import Example
from .images import open_image
from .records import BeamDataError


@dataclass
class DataCollatorForRawBeams:
    """Make a batch of groups for a [`ClipSelector`], which embeds images and texts itself.

    Each image and each text of the batch is in it once, however many rows, queries and pools have it. A candidate's
    text holds its answer, a query's does not: a row that is both has two texts, and one image.

    Args:
        examples (`list[Example]`):
            All rows that the log names, each id once.
        processor (`ProcessorMixin`):
            That of the CLIP checkpoint: its `tokenizer` and its `image_processor`.
        modalities (`list[str]`, *optional*, defaults to `("image", "text")`):
            What the selector sees rows by, `config.modalities`. With both, a row may lack an image.
        query_template (`str`, *optional*, defaults to `"{question}"`):
            The text of a query.
        candidate_template (`str`, *optional*, defaults to `"{question} {answer}"`):
            The text of a candidate, of its question and its first answer.
        max_length (`int`, *optional*):
            Tokens of a text at most; by default what the tokenizer allows. Longer texts are cut, with a warning.

    Returns:
        A dict as of [`DataCollatorForBeams`], but with item numbers (int64) as `query_embeds` (B, M) and
        `candidate_embeds` (U, M), a column per modality, -1 where a row has no image; and with `items`, a dict of
        `pixel_values` (I, 3, h, w), `input_ids` (J, L) and `attention_mask` (J, L).

    Raises:
        ValueError: an id is there twice, a modality is unknown, or a query's text would hold the answer.

    Example:

    ```python
    >>> from transformers import AutoProcessor
    >>> from lever_grpo.data import DataCollatorForRawBeams, load_examples
    >>> processor = AutoProcessor.from_pretrained("openai/clip-vit-base-patch32")  # doctest: +SKIP
    >>> collate = DataCollatorForRawBeams(load_examples("rows.jsonl"), processor)  # doctest: +SKIP

    ```
    """

    examples: Sequence[Example]
    processor: Any
    modalities: Sequence[str] = ("image", "text")
    query_template: str = "{question}"
    candidate_template: str = "{question} {answer}"
    max_length: int | None = None
    _by_id: dict[int, Example] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.modalities or set(self.modalities) - {"image", "text"}:
            raise ValueError(f"modalities={list(self.modalities)}: must be 'image', 'text' or both.")
        if "{answer}" in self.query_template:
            raise ValueError(
                f"query_template={self.query_template!r} holds {{answer}}, which a query does not show; take it out."
            )
        self._by_id = {row.id: row for row in self.examples}
        if len(self._by_id) < len(self.examples):
            raise ValueError("examples have an id twice; each row of the task has its own.")
        if self.max_length is None:
            self.max_length = self.processor.tokenizer.model_max_length
        if self.max_length > 1_000_000:  # how tokenizers write that they know of no limit
            raise ValueError(
                "max_length=None, and the tokenizer has no limit either; give that of the selector, "
                "config.clip_config.text_config.max_position_embeddings."
            )

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        groups, candidate_ids = collate_groups(rows)
        queries, candidates = (self._rows(ids.tolist()) for ids in (groups["query_ids"], candidate_ids))
        numbers, items = self.itemise(queries, candidates)
        return {
            "query_embeds": numbers[: len(queries)],
            "candidate_embeds": numbers[len(queries) :],
            **groups,
            "items": items,
        }

    def itemise(
        self, queries: Sequence[Example], candidates: Sequence[Example]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """
        Item numbers of rows, and the items, as [`ClipSelector.embed`] takes them.

        Args:
            queries (`list[Example]`), candidates (`list[Example]`):
                Rows; they need not be among `examples`.

        Returns:
            `tuple`: the numbers (N, M) of the queries and, behind them, of the candidates; and `items`.
        """
        rows = [*queries, *candidates]
        columns, items = [], {}
        if "image" in self.modalities:
            numbers, images = _numbered([row.image for row in rows])
            columns.append(numbers)
            items["pixel_values"] = self._pixels(images, rows)
        if "text" in self.modalities:
            texts = [_text(self.query_template, row) for row in queries]
            texts += [_text(self.candidate_template, row) for row in candidates]
            numbers, texts = _numbered(texts)
            columns.append(numbers)
            items |= self._tokens(texts)
        return torch.tensor(columns, dtype=torch.int64).T.contiguous(), items

    def _rows(self, ids: Iterable[int]) -> list[Example]:
        ids = list(ids)
        unknown = [i for i in ids if i not in self._by_id]
        if unknown:
            shown = ", ".join(map(str, unknown[:5]))
            raise BeamDataError(
                f"the log names rows that are not among the {len(self._by_id)} examples: {shown} ({len(unknown)} in "
                "this batch); do the examples belong to this log's split?"
            )
        return [self._by_id[i] for i in ids]

    def _pixels(self, images: Sequence[Any], rows: Sequence[Example]) -> torch.Tensor:
        without = [row.id for row in rows if row.image is None]
        if without and "text" not in self.modalities:
            raise BeamDataError(f"rows {without[:5]} have no image, which is all that the selector sees them by.")
        if not images:
            return torch.zeros(0, 3, 1, 1)
        pictures = []
        for image in images:
            try:
                pictures.append(open_image(image))
            except (OSError, ValueError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
                row = next(row.id for row in rows if row.image == image)
                raise BeamDataError(
                    f"row {row}: its image cannot be decoded ({error}); mend it, or leave the row out of the log."
                ) from error
        return self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]

    def _tokens(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        tokenizer, limit = self.processor.tokenizer, self.max_length
        assert limit is not None
        if any(len(ids) > limit for ids in tokenizer(list(texts), verbose=False)["input_ids"]):
            warnings.warn(
                f"texts are longer than max_length={limit} tokens and are cut; shorten the templates, or take an "
                "encoder that reads more.",
                stacklevel=2,
            )
        tokens = tokenizer(
            list(texts), padding=True, padding_side="right", truncation=True, max_length=limit, return_tensors="pt"
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _text(template: str, row: Example) -> str:
    return template.replace("{question}", row.question).replace("{answer}", row.answers[0])


def _numbered(values: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """The number of each value among the different ones, which come in the order of their first; -1 for `None`."""
    places: dict[Any, int] = {}
    numbers = [-1 if value is None else places.setdefault(value, len(places)) for value in values]
    return numbers, list(places)
