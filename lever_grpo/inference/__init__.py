"""Use of a trained selector: choices for a data set of queries, the model's answers with them, what they are worth."""

from .answering import Answered, answer_questions, read_answers
from .baselines import best_logged, mixed_picks, mmr_picks, random_picks
from .choices import choose, evaluate_selectors
from .demonstration_selector import DemonstrationSelector, Selection, write_selections


__all__ = [
    "Answered",
    "DemonstrationSelector",
    "Selection",
    "answer_questions",
    "best_logged",
    "choose",
    "evaluate_selectors",
    "mixed_picks",
    "mmr_picks",
    "random_picks",
    "read_answers",
    "write_selections",
]
