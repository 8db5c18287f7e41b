"""
What each stage of the training gained: from per-query rewards to `report.json`, `report.md`, figures and console
tables.

The way through the files: `results` (per-query results of a method) → `build` and `pool` (the report as a dictionary)
→ `tables` and `figures` (the same numbers as text and as pictures) → `write` (onto the disk), or `html` (several
metrics and numbers of shots as one page to browse).
"""

from .build import build_report, default_pairs
from .html import write_html
from .pool import pool_tasks
from .results import MethodResult, load_results, save_results, stack_seeds
from .tables import print_report, to_markdown
from .write import write_report


__all__ = [
    "MethodResult",
    "build_report",
    "default_pairs",
    "load_results",
    "pool_tasks",
    "print_report",
    "save_results",
    "stack_seeds",
    "to_markdown",
    "write_html",
    "write_report",
]
