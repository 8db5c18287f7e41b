"""The whole way from a beam log to a post-trained selector and its report, as the recipes run it."""

from .arguments import RecipeArguments, parse
from .runs import judge, report, run, similarity_baseline
from .stages import build_selector, train
from .task_data import TaskData, load_task


__all__ = [
    "RecipeArguments",
    "TaskData",
    "build_selector",
    "judge",
    "load_task",
    "parse",
    "report",
    "run",
    "similarity_baseline",
    "train",
]
