"""The page itself: controls of Gradio around [`Session`]."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..pipeline.frozen_model import make_scorer
from ..report.results import method_label
from ..scorers import Scorer, ScorerError
from .arguments import DemoArguments
from .session import Session, Shown
from .view import STYLE, render, render_notes


logger = logging.getLogger(__name__)

LONGEST = 100  # characters of a question in the list
UPLOAD = "10mb"  # largest image
# of the system: those of Gradio's own themes come from elsewhere
FONT, MONO_FONT = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]


def run_demo(arguments: DemoArguments) -> None:
    """
    Serves the page until it is interrupted.

    Raises:
        ImportError: if Gradio, or what the model needs, is not installed.
        ValueError: if files, options and selectors do not fit each other.
    """
    _gradio()  # before anything is loaded
    scorer, why_not = load_model(arguments)
    app = build_app(Session(arguments, scorer), why_not)
    print(start(app, arguments), flush=True)
    app.block_thread()


def load_model(arguments: DemoArguments) -> tuple[Scorer | None, str | None]:
    """The frozen model; or, where none is wanted or none was named and the default is not installed, why not."""
    if not arguments.ask:
        return None, "it was not to be asked (ask)."
    try:
        state = PartialState(cpu=arguments.device == "cpu" or not torch.accelerator.is_available())
        return make_scorer(arguments, state), None
    except ImportError as error:
        if arguments.model is not None:
            raise
        logger.warning("the page shows no answers: %s", error)
        return None, f"{error}."


def build_app(session: Session, no_model: str | None = None) -> Any:
    """
    The page of a session.

    Args:
        session ([`Session`]):
            What is asked.
        no_model (`str`, *optional*):
            Why the session has no model, for the reader.

    Returns:
        `gradio.Blocks`: The page, for [`start`].

    Raises:
        ImportError: if Gradio is not installed.
    """
    gr = _gradio()
    arguments = session.arguments
    notes = []
    if session.scorer is None:
        notes.append(f"No model answers here, so picks and log-probabilities are all there is: {no_model}")
    if session.no_typed_queries is not None:
        notes.append(f"Queries can be picked, not typed: {session.no_typed_queries}")
    several = [method_label(name) for name, paths in arguments.seeds_of.items() if len(paths) > 1]
    if several:
        notes.append(f"Of {', '.join(several)} the first seed is shown.")

    def show(find: Callable[[], Shown]) -> str:
        try:
            return render(find(), asked=session.scorer is not None)
        except (ValueError, OSError, ScorerError) as error:
            return render_notes([str(error)])

    def pick(query_id: int | None, num_shots: int) -> str:
        if query_id is None:
            return render_notes(["Pick a query first."])
        return show(lambda: session.held_out(query_id, num_shots))

    def ask(question: str, image: str | None, num_shots: int) -> str:
        return show(lambda: session.typed(question, num_shots, None if image is None else Path(image)))

    rows = session.queries.rows
    listed = [(f"{query}: {rows[query].question[:LONGEST]}", query) for query in session.query_ids]
    may_type = session.no_typed_queries is None
    one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "session"}
    with gr.Blocks(title="lever_grpo: try a selector", analytics_enabled=False) as app:
        gr.HTML("<h1>Try a selector</h1>" + render_notes(notes))
        shots = gr.Radio(arguments.num_shots, value=max(arguments.num_shots), label="Demonstrations")
        with gr.Tab("Pick a query"):
            query = gr.Dropdown(listed, value=session.query_ids[0], label="Held-out query", elem_id="query")
            pick_button = gr.Button("Show", variant="primary", elem_id="pick")
        with gr.Tab("Type a query"):
            question = gr.Textbox(label="Question", interactive=may_type, elem_id="question")
            image = gr.Image(
                label="Image", type="filepath", sources=["upload"], interactive=may_type, visible=session.sees_images
            )
            ask_button = gr.Button("Show", variant="primary", interactive=may_type, elem_id="ask")
        # no script of its own, and nothing but what `render` escaped
        found = gr.HTML(elem_id="found", js_on_load=None)
        pick_button.click(pick, [query, shots], found, api_name="pick", **one_at_a_time)
        if may_type:
            ask_button.click(ask, [question, image, shots], found, api_name="ask", **one_at_a_time)
    return app


def start(app: Any, arguments: DemoArguments) -> str:
    """
    Serves a page in the background.

    Args:
        app (`gradio.Blocks`):
            The page.
        arguments ([`DemoArguments`]):
            Where to listen.

    Returns:
        `str`: Its address.

    Raises:
        OSError: if the port is taken.
    """
    _, local, public = app.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        share=arguments.share,
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=[],
        max_file_size=UPLOAD,
        theme=_gradio().themes.Base(font=FONT, font_mono=MONO_FONT),
        css_paths=STYLE,
    )
    return public or local


def _gradio() -> Any:
    """Gradio, which is told not to send anything home before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio, which is not installed: pip install 'lever_grpo[demo]'") from error
    return gradio
