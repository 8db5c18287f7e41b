"""A report onto the disk: every file appears whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import atomic_file


def write_report(report: Mapping[str, Any], output_dir: str | os.PathLike) -> dict[str, Path]:
    """
    Write `report.json`, `report.md`, `gains.png` and, where the report has a log of the training, `curves.png`.

    Everything is rendered before the first file is written, and each file replaces its predecessor in one step, so a
    failure leaves the old report as it was.

    Args:
        report (`Mapping`):
            What [`build_report`] or [`pool_tasks`] returned.
        output_dir (`str` or `os.PathLike`):
            Folder, made if it is not there.

    Returns:
        `dict[str, Path]`: The files by name.

    Raises:
        ValueError: If a number in the report is NaN or infinite; JSON has no such values.

    Example:
    ```python
    >>> import tempfile
    >>> from lever_grpo.report import MethodResult, build_report, write_report
    >>> report = build_report([MethodResult("random", [0.0, 1.0]), MethodResult("oracle", [2.0, 3.0])])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     sorted(write_report(report, folder))
    ['gains.png', 'report.json', 'report.md']

    ```
    """
    # Here, because these import matplotlib and the tables, which the rest of the package never needs.
    from .figures import draw_curves, draw_gains
    from .tables import to_markdown

    images = {"gains.png": draw_gains(report)}
    curves = draw_curves(report)
    if curves is not None:
        images["curves.png"] = curves
    contents = {
        "report.json": (json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "report.md": to_markdown(report, images=list(images)).encode(),
    } | images
    folder = Path(output_dir)
    for name, content in contents.items():
        with atomic_file(folder / name) as stream:
            stream.write(content)
    return {name: folder / name for name in contents}
