"""What must be known of a log before it is read: its reward columns, and what its scores are made of."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from .formats import POINTER_FIELDS, SCORED_FIELDS, record_kind
from .orders import parse_log_name
from .readers import iter_records
from .records import is_number


logger = logging.getLogger(__name__)

PEEK_RECORDS = 8  # records of each file that are looked at to find its reward columns
# score of a format 3 file when nobody names one: the preset `hard_plus_soft`, else the logged beam score
POINTER_SCORES: tuple[dict[str, float], ...] = ({"vqa_correct": 1.0, "vqa_acc_score": 1.0}, {"beam_score": 1.0})


def peek(files: Sequence[str]) -> tuple[dict[str, None], set[str], dict[str, Any]]:
    """Numeric reward columns, kinds of records and file metadata, from the first records of each file."""
    found: dict[str, None] = {}
    kinds: set[str] = set()
    metadata: dict[str, Any] = {}
    for file in files:
        about = parse_log_name(file)
        for key, _, record in islice(iter_records(file), PEEK_RECORDS):
            if isinstance(record, Mapping) and (key or next(iter(record), "")).startswith("_"):
                about.update({key: record} if key else record)
                continue
            kind = record_kind(record)
            if kind is None:
                continue  # the reader proper says what is wrong with it
            kinds.add(kind)
            if kind == "group":
                columns = record.get("columns")
                found.update(dict.fromkeys(columns if isinstance(columns, Mapping) else ()))
            elif kind in ("pointer", "scored"):
                entries = record["pointer_candidates" if kind == "pointer" else "sequences"]
                skip = POINTER_FIELDS if kind == "pointer" else SCORED_FIELDS
                for entry in entries if isinstance(entries, list) else ():
                    if isinstance(entry, Mapping):
                        found.update(dict.fromkeys(k for k, v in entry.items() if k not in skip and is_number(v)))
        if about:
            metadata[Path(file).name] = about
    return found, kinds, metadata


def score_weights(
    score_column: str | Mapping[str, float] | None, kinds: set[str], found: Mapping[str, None]
) -> dict[str, float] | None:
    if isinstance(score_column, str):
        return {score_column: 1.0}
    if score_column is not None:
        return {name: float(weight) for name, weight in score_column.items()}
    if kinds == {"pointer"}:
        for weights in POINTER_SCORES:
            if set(weights) <= set(found):
                logger.info("score of the groups: %s (choose another with score_column)", " + ".join(weights))
                return weights
    return None
