"""Use of a trained selector: choices for a data set of queries, and what they were worth."""

from .choices import choose, evaluate_selectors


__all__ = ["choose", "evaluate_selectors"]
