"""
The Hugging Face Hub: selectors, beam logs and reports with their cards, and runs that go on from there.

`cards` says what a reader is told, `push` sends folders, `logs` makes a beam log a dataset, `resume` fetches a run.
Nothing here is called unless a push or a Hub id is asked for.
"""

from .cards import selector_card
from .logs import push_log
from .push import push_folder, push_report, push_selector
from .resume import fetch_run


__all__ = ["fetch_run", "push_folder", "push_log", "push_report", "push_selector", "selector_card"]
