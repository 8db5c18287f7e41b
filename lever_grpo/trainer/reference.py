"""The reference's log-probabilities as a column of the data set: computed once, before training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor, nn


REFERENCE_COLUMN = "ref_log_probs"


def add_reference_log_probs(
    dataset: Dataset,
    log_probs: Callable[[dict[str, Any]], Tensor],
    data_collator: Callable[[list[Any]], dict[str, Any]],
    batch_size: int = 32,
) -> Dataset:
    """
    Adds the column `ref_log_probs`: the log-probability of every logged pick, one list per sequence.

    Args:
        dataset (`datasets.Dataset`):
            Rows of [`load_beams`].
        log_probs (`Callable`):
            Gives log-probabilities (B, G, T) for a batch: T is S or, of a policy that may stop, S + 1.
        data_collator ([`DataCollatorForBeams`]):
            Makes batches of rows.
        batch_size (`int`, *optional*, defaults to `32`):
            Rows per batch.
    """
    column: list[list[list[float]]] = []
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[i] for i in range(start, min(start + batch_size, len(dataset)))]
        batch = data_collator(rows)
        values = log_probs(batch).float().cpu()  # (B, G, T)
        stops = values.shape[-1] - batch["sequences"].shape[-1]
        column += [
            [beam[: len(sequence) + stops] for beam, sequence in zip(beams, row["sequences"], strict=False)]
            for beams, row in zip(values.tolist(), rows, strict=True)
        ]
    if REFERENCE_COLUMN in dataset.column_names:
        dataset = dataset.remove_columns(REFERENCE_COLUMN)
    feature = Features({REFERENCE_COLUMN: List(List(Value("float32")))})
    added = Dataset.from_dict({REFERENCE_COLUMN: column}, features=feature)
    return dataset.add_column(REFERENCE_COLUMN, added.data.column(REFERENCE_COLUMN), feature=feature[REFERENCE_COLUMN])


@dataclass
class CollatorWithReference:
    """
    Pads the column `ref_log_probs` (B, G, T) beside what another collator makes; rows without it pass as they are.

    Args:
        data_collator ([`DataCollatorForBeams`]):
            Makes the rest of the batch.
    """

    data_collator: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.data_collator(rows)
        if all(REFERENCE_COLUMN in row for row in rows):
            beams = [[torch.tensor(beam) for beam in row[REFERENCE_COLUMN]] for row in rows]
            steps = max(len(beam) for group in beams for beam in group)
            padded = torch.zeros(*batch["sequence_mask"].shape[:2], steps)  # (B, G, T)
            for row, group in zip(padded, beams, strict=True):
                row[: len(group)] = nn.utils.rnn.pad_sequence([*group, row[0]], batch_first=True)[:-1]
            batch[REFERENCE_COLUMN] = padded
        return batch
