"""A page to try a selector: what each method picks for a query, and what the frozen model then answers."""

from .arguments import DemoArguments, parse_demo
from .session import Choice, Session, Shown


__all__ = ["Choice", "DemoArguments", "Session", "Shown", "parse_demo"]
