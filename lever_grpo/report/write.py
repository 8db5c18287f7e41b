"""A report onto the disk: every file appears whole or not at all."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_atomic(folder / name, content)
    return {name: folder / name for name in contents}


def write_atomic(path: Path, content: bytes) -> None:
    """
    Write a file that other processes see either as it was or complete.

    Example:
    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from lever_grpo.report.write import write_atomic
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_atomic(Path(folder, "a.txt"), b"whole")
    ...     [file.name for file in Path(folder).iterdir()]
    ['a.txt']

    ```
    """
    # The temporary file lies in the same folder: a rename is atomic only inside one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        # mkstemp makes private files; a report is to be read by whom the folder lets in.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
