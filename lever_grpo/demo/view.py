"""What the page shows of a query, as HTML: every text of the data stands there as text, whatever it holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..report.html import image_uri
from ..report.results import method_label
from .session import Shown


TEMPLATES = Path(__file__).parent / "templates"
STYLE = TEMPLATES / "demo.css"

_environment = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters["label"] = method_label
_environment.filters["uri"] = image_uri


def render(shown: Shown, asked: bool) -> str:
    """
    A query, the choices of all methods side by side, and its pool.

    Args:
        shown ([`Shown`]):
            What [`Session`] found.
        asked (`bool`):
            Whether there is a model that was asked for answers.

    Returns:
        `str`: HTML to be set into a page.

    Example:

    ```python
    >>> from lever_grpo.data import Example
    >>> from lever_grpo.demo import Shown
    >>> from lever_grpo.demo.view import render
    >>> "<b>What?</b>" in render(Shown(Example(0, "<b>What?</b>", ("?",)), False, (), {}, ()), asked=False)
    False

    ```
    """
    return _environment.get_template("shown.html").render(shown=shown, asked=asked)


def render_notes(notes: Sequence[str]) -> str:
    """Notes, one a paragraph."""
    return _environment.get_template("notes.html").render(notes=notes)
