"""Files that appear whole or not at all, and folders that one run writes at a time."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout


LOCK_FILE = ".lock"


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """
    A binary file to write, and the folder it lies in. Others see the old file or the whole new one and never a part,
    also when the writing fails or the machine stops.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from lever_grpo.atomic import atomic_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_file(Path(folder, "new", "a.txt")) as stream:
    ...         _ = stream.write(b"whole")
    ...     [file.name for file in Path(folder, "new").iterdir()]
    ['a.txt']

    ```
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder, as only renaming inside one file system is atomic; short, as log names come near the limit
    temporary = path.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # writing to a full disk names no file
    finally:
        temporary.unlink(missing_ok=True)
    flush([path.parent])  # the new name is in the folder, which has its own cache


def flush(paths: Iterable[Path]) -> None:
    """Has the system write files and folders to the disk, so that they are whole behind a power cut (POSIX)."""
    for path in paths if os.name == "posix" else ():
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def one_run(folder: Path, wanted: bool = True) -> Iterator[None]:
    """
    Keeps a folder for this process as long as the context lasts; the system lifts the lock when the process ends,
    however it does.

    Args:
        folder (`Path`):
            Made if it is not there, and removed again if nothing was written to it.
        wanted (`bool`, *optional*, defaults to `True`):
            False in the processes of a run that leave the folder to their main process.

    Raises:
        ValueError: if another run writes there.
    """
    if not wanted:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"output_dir={str(folder)!r} is being written by another run; wait for its end, or name another folder."
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows deletes no open file; a folder that holds something stays
            (folder / LOCK_FILE).unlink()
            folder.rmdir()
        lock.release()


def refuse_links(paths: Iterable[Path]) -> None:
    """
    Raises an error if a file or folder that a run writes or deletes is a link: it would do so elsewhere.

    Raises:
        ValueError: if one is; the message names it.
    """
    links = [str(path) for path in paths if path.is_symlink()]
    if links:
        raise ValueError(f"{', '.join(links)}: expected files and folders of a run, found links; remove them.")
