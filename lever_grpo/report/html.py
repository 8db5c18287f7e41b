"""An evaluation as one HTML file that needs nothing beside itself: tables, plots and every query to look at."""

import base64
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..atomic import atomic_file
from .build import to_jsonable
from .results import ORACLE, method_label, method_order
from .tables import describe, digits_of, interval_text, pair_label, percent_text, verdict


TEMPLATES = Path(__file__).parent / "templates"
IMAGE_SIDE = 160  # pixels
APART = ("zero_shot", ORACLE)  # rows that bound the others and do not compete with them

Image = str | os.PathLike | bytes


def write_html(evaluation: Mapping[str, Any], path: str | os.PathLike) -> Path:
    """
    Write the page of an evaluation: tables and plots of each metric, then the queries with what each method chose.

    The file loads nothing from elsewhere, and forbids itself to (Content-Security-Policy). Texts of the data are shown
    as text, whatever they hold. Images are scaled down to 160 pixels where Pillow is installed, and each is stored
    once.

    Args:
        evaluation (`Mapping`):
            What to show; all but `metrics` may be left out.

            * `title` (`str`), `notes` (list of `str`) and `settings` (dictionary): printed as they are.
            * `metrics`: name of the metric → number of shots → what [`build_report`] returned for it.
            * `gallery`: a list of queries: `query_id`, `question`, `answers` (the references), `image` (a path, the
              bytes of a file, or `None`) and `picks`: number of shots → method → a dictionary of `demonstrations`
              (each with `id`, `question`, `answer`, `image`), in the order of the prompt, and of the model's `answer`,
              its `accuracy` in [0, 1] and `log_prob`, each where it is known.
        path (`str` or `os.PathLike`):
            The file; it appears whole or not at all.

    Returns:
        `Path`: The file.

    Raises:
        ValueError: If there is no metric, an image cannot be read, or a number is NaN or infinite.

    Example:
    ```python
    >>> import tempfile
    >>> from lever_grpo.report import MethodResult, build_report, write_html
    >>> report = build_report([MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [1.0, 1.0])])
    >>> query = {"query_id": 5, "question": "What is it?", "answers": ["food"]}
    >>> query["picks"] = {"1": {"random": {"demonstrations": [], "answer": "a hat", "accuracy": 0.0}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = write_html({"metrics": {"accuracy": {"1": report}}, "gallery": [query]}, f"{folder}/report.html")
    ...     file.read_text(encoding="utf-8")[:15]
    '<!DOCTYPE html>'

    ```
    """
    metrics = evaluation["metrics"]
    if not metrics or not all(metrics.values()):
        raise ValueError(f"metrics is {metrics!r}; give at least one metric, and each a report for a number of shots.")
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    page = environment.get_template("report.html").render(
        title=evaluation.get("title", "Evaluation"),
        settings=evaluation.get("settings", {}),
        notes=_notes(evaluation),
        metrics=[_metric(name, _by_shots(reports)) for name, reports in metrics.items()],
        gallery=_gallery(evaluation.get("gallery", [])),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )
    with atomic_file(Path(path)) as stream:
        stream.write(page.encode())
    return Path(path)


def _by_shots(reports: Mapping[str, Any]) -> dict[str, Any]:
    """The same with the numbers of shots as texts, in rising order."""
    return {str(shots): reports[shots] for shots in sorted(reports, key=int)}


def _notes(evaluation: Mapping[str, Any]) -> list[str]:
    """The evaluation's own notes, then those of its reports with where they come from."""
    return list(evaluation.get("notes", [])) + [
        f"{name}, shots {shots}: {note}"
        for name, reports in evaluation["metrics"].items()
        for shots, report in _by_shots(reports).items()
        for note in report["notes"]
    ]


def _metric(name: str, reports: Mapping[str, Any]) -> dict[str, Any]:
    """One metric's tables, a column per number of shots, and its plots."""
    # Here, because it imports matplotlib, which the rest of the package never needs.
    from .plots import plot_gains, plot_shots

    # A hundredth of the gap is what a reader compares; the intervals are wider than that.
    digits = min(
        digits_of(10 * (r["gap"] or max(abs(m["reward"]["mean"]) for m in r["methods"].values())))
        for r in reports.values()
    )
    means = [{m: row["reward"]["mean"] for m, row in r["methods"].items() if m not in APART} for r in reports.values()]
    best = [max(column.values(), default=None) for column in means]
    methods = [
        {
            "label": method_label(method),
            "apart": method in APART,
            "cells": [
                {
                    "text": interval_text(row["reward"], digits),
                    "gap_closed": row.get("gap_closed"),
                    "best": method not in APART and row["reward"]["mean"] == top,
                }
                if (row := report["methods"].get(method))
                else None
                for report, top in zip(reports.values(), best, strict=True)
            ],
        }
        for method in method_order(list(dict.fromkeys(m for r in reports.values() for m in r["methods"])))
    ]
    pairs = [
        {
            "label": pair_label(pair),
            "cells": [
                {
                    "text": interval_text(row, digits, signed=True),
                    "p": f"{row['p_value']:.4f}",
                    "verdict": verdict(row),
                }
                if (row := report["paired"].get(pair))
                else None
                for report in reports.values()
            ],
        }
        for pair in dict.fromkeys(pair for report in reports.values() for pair in report["paired"])
    ]
    first = next(iter(reports.values()))
    return {
        "name": name.replace("_", " "),
        "about": describe(first),
        "interval": percent_text(first),
        "columns": [{"shots": shots, "queries": report["n_queries"]} for shots, report in reports.items()],
        "methods": methods,
        "pairs": pairs,
        "shots_plot": plot_shots(reports),
        "gains_plot": plot_gains(reports),
    }


def _gallery(queries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    The queries as report.js reads them. Methods and numbers of shots are places in a list, and so are demonstrations
    and images, which many picks share; a pick is [demonstrations, answer, accuracy, log_prob].
    """
    images: dict[Image, int] = {}
    demonstrations: dict[tuple, int] = {}

    def image_place(image: Image | None) -> int | None:
        return None if image is None else images.setdefault(image, len(images))

    def demonstration_place(row: Mapping[str, Any]) -> int:
        key = (str(row["id"]), row["question"], row["answer"], image_place(row.get("image")))
        return demonstrations.setdefault(key, len(demonstrations))

    picks = [{str(shots): by_method for shots, by_method in query["picks"].items()} for query in queries]
    shots = sorted({shots for by_shots in picks for shots in by_shots}, key=int)
    methods = method_order(list(dict.fromkeys(m for by_shots in picks for row in by_shots.values() for m in row)))
    rows = [
        {
            "id": str(query["query_id"]),
            "question": query["question"],
            "answers": [f"{text} ×{n}" if n > 1 else text for text, n in Counter(query["answers"]).most_common()],
            "image": image_place(query.get("image")),
            "picks": [
                [
                    [
                        [demonstration_place(row) for row in pick["demonstrations"]],
                        *(pick.get(key) for key in ("answer", "accuracy", "log_prob")),
                    ]
                    if (pick := by_shots.get(number, {}).get(method))
                    else None
                    for method in methods
                ]
                for number in shots
            ],
        }
        for query, by_shots in zip(queries, picks, strict=True)
    ]
    gallery = {
        "shots": shots,
        "methods": [method_label(method) for method in methods],
        # what the filter offers first: does the last trained method answer what similarity does not?
        "compared": [_preferred(methods, "grpo", "rce", "sft"), _preferred(methods, "similarity", "random")],
        "judged": any(pick and pick[2] is not None for row in rows for column in row["picks"] for pick in column),
        "images": [image_uri(image) for image in images],
        "demonstrations": list(demonstrations),
        "queries": rows,
    }
    return to_jsonable(gallery, "gallery")


def _preferred(methods: Sequence[str], *names: str) -> int:
    """Place of the first of the names that is there, else 0."""
    return next((methods.index(name) for name in names if name in methods), 0)


def image_uri(image: Image) -> str:
    """The image as a data URI, small where Pillow is there to make it so."""
    content = image if isinstance(image, bytes) else Path(image).read_bytes()
    try:
        from PIL import Image as PillowImage
        from PIL import ImageOps
    except ImportError:
        kind = "application/octet-stream"  # a browser looks into the file for what it is
    else:
        try:
            with PillowImage.open(io.BytesIO(content)) as picture:
                small = ImageOps.exif_transpose(picture).convert("RGBA")
        except (OSError, SyntaxError, PillowImage.DecompressionBombError) as error:  # Pillow's, of some broken PNGs
            name = f"of {len(image)} bytes" if isinstance(image, bytes) else repr(os.fspath(image))
            raise ValueError(f"image {name} cannot be read ({error}); give a whole image file, or None.") from error
        small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        stream = io.BytesIO()
        small.save(stream, "WEBP", quality=80)
        kind, content = "image/webp", stream.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _hash(text: str) -> str:
    """What the page's policy names a style or a script by; no other one is run."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
