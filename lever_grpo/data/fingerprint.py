"""What a cached dataset is recognised by: the content of its files, the options, and the code that read them.

These helpers stand apart from the builder on purpose: `datasets` replaces `open`, `Path` and parts of `os` in the
module of every builder that is made, so that `isinstance(value, Path)` there is true for the first call of a process
and false afterwards.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets.data_files import DataFilesList


CODE = ("beam_json", "columns", "fingerprint", "formats", "groups", "orders", "peek", "pools", "readers", "records")


def file_digest(path: str) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Digest of the reading code, so that a cache made by other code is not taken for its own."""
    text = b"".join((Path(__file__).parent / f"{name}.py").read_bytes() for name in CODE)
    return hashlib.sha256(text).hexdigest()[:16]


def plain_path(value: Any) -> Any:
    """A path as text; anything else as it is."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def side_file_key(value: Any) -> Any:
    """What stands for a side file in the cache's key: its name and content. Anything else stands for itself."""
    value = plain_path(value)
    return f"{os.path.basename(value)}:{file_digest(value)}" if isinstance(value, str) else value


def data_files_list(files: list[str]) -> DataFilesList:
    """Files for a builder, known by name and content.

    `datasets` itself would read Lever-LM file names as patterns, and knows local files by their time only.
    """
    return DataFilesList(files, [(os.path.basename(file), file_digest(file)) for file in files])
