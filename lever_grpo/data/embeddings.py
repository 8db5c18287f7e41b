"""Named, row-aligned embeddings: memory-mapped, looked up by row id, never copied into dataset rows, never pickled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch

from .records import BeamDataError


_SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
}
_ROWS = ".rows"  # an array `image.rows` (N,) says which row of `image` each row id has
_MAX_HEADER = 100_000_000  # the limit of the safetensors format
_MAX_NPY_HEADER = 10_000  # numpy's own limit
_CHECK_ROWS = 65_536


class _Mapped(NamedTuple):
    """Where an array lies on disk, so that a worker process can map it again instead of receiving its bytes."""

    path: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def open(self) -> np.ndarray:
        return np.memmap(self.path, dtype=np.dtype(self.dtype), mode="r", shape=self.shape, offset=self.offset)


class EmbeddingStore:
    """Features of all rows of a data set: each a (N, width) array, one row a row id, float16 or float32 on disk.

    Names are free: `question`, `question_answer`, `image`, `answer`, … Arrays opened from files stay on disk until
    rows are gathered, and a pickled store (for a data loader's worker) holds paths, not numbers.

    Many rows can share an embedding (several questions about one image). It is then stored once: with a second array
    `image.rows` of N whole numbers, row id i has row `image.rows[i]` of `image`.

    Args:
        arrays (`Mapping[str, np.ndarray]`):
            Arrays in memory. For files see [`EmbeddingStore.open`].

    Raises:
        [`BeamDataError`]: an array is not a (N, width) array of floats, or two arrays have different numbers of rows.

    Example:

    ```python
    >>> import numpy as np
    >>> from lever_grpo.data import EmbeddingStore
    >>> store = EmbeddingStore({"question": np.ones((5, 3), np.float16), "image": np.zeros((5, 2), np.float32)})
    >>> len(store), store.widths
    (5, {'question': 3, 'image': 2})
    >>> store.gather([4, 0], ["question", "image"]).shape
    (2, 5)

    ```
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        if not arrays:
            raise BeamDataError("expected at least one embedding array, found none")
        self._mapped: dict[str, _Mapped] = {}
        self._set(dict(arrays))
        rows = {name: self._rows_of(name) for name in self._arrays}
        if len(set(rows.values())) > 1:
            raise BeamDataError(f"embeddings must be row-aligned: expected one number of rows, found {rows}")

    def _set(self, arrays: dict[str, np.ndarray]) -> None:
        self._index = {name.removesuffix(_ROWS): array for name, array in arrays.items() if name.endswith(_ROWS)}
        self._arrays = {name: array for name, array in arrays.items() if not name.endswith(_ROWS)}
        for name, array in self._arrays.items():
            if array.ndim != 2 or array.dtype.kind != "f" or 0 in array.shape:
                raise BeamDataError(
                    f"embeddings '{name}': expected floats of shape (rows, width), found {array.dtype} of shape "
                    f"{array.shape}"
                )
        for name, index in self._index.items():
            stored = len(self._arrays.get(name, ()))
            if (
                index.ndim != 1
                or index.dtype.kind != "i"
                or not len(index)
                or not 0 <= index.min() <= index.max() < stored
            ):
                raise BeamDataError(
                    f"embeddings '{name}{_ROWS}': expected whole numbers of shape (rows,), each a row of '{name}' "
                    f"({stored} rows), "
                    f"found {index.dtype} of shape {index.shape}"
                )

    def _rows_of(self, name: str) -> int:
        return len(self._index.get(name, self._arrays[name]))

    @classmethod
    def open(cls, source: str | Path | Mapping[str, str | Path]) -> EmbeddingStore:
        """Map a `.safetensors` file, a `.npy` file (named after its stem), a folder of `.npy` files, or a dict of
        name to `.npy`."""
        if isinstance(source, Mapping):
            return cls.from_files(source)
        path = Path(source)
        if path.is_dir():
            files = sorted(path.glob("*.npy"))
            if not files:
                raise FileNotFoundError(f"{path}: expected .npy files in this folder, found none")
            return cls.from_files({file.stem: file for file in files})
        if path.suffix == ".npy":
            return cls.from_files({path.stem: path})
        return cls.from_safetensors(path)

    @classmethod
    def from_files(cls, files: Mapping[str, str | Path]) -> EmbeddingStore:
        """Map one `.npy` file a name. Pickled objects inside are refused (`allow_pickle=False`)."""
        mapped: dict[str, _Mapped] = {}
        for name, file in files.items():
            with open(file, "rb") as stream:
                magic, version, length = stream.read(6), stream.read(2), int.from_bytes(stream.read(4), "little")
            if magic == b"\x93NUMPY" and version[:1] > b"\x01" and length > _MAX_NPY_HEADER:
                # numpy would read all of it first
                raise BeamDataError(
                    f"{file}: expected a .npy array of floats for '{name}', found a header of {length:,} bytes"
                )
            try:
                array = np.load(file, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # of a broken header, any: ValueError, EOFError, SyntaxError, TokenError …
                raise BeamDataError(f"{file}: expected a .npy array of floats for '{name}', found {error}") from error
            if not isinstance(array, np.memmap) or not array.flags.c_contiguous:
                raise BeamDataError(
                    f"{file}: expected a row-major array for '{name}', found another file or order of axes"
                )
            mapped[name] = _Mapped(os.path.abspath(file), array.dtype.str, array.shape, int(array.offset))
        return cls._from_mapped(mapped, ", ".join(map(str, files.values())))

    @classmethod
    def from_safetensors(cls, path: str | Path) -> EmbeddingStore:
        """Map every tensor of a `.safetensors` file under its own name."""
        mapped: dict[str, _Mapped] = {}
        size = os.path.getsize(path)
        with open(path, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise BeamDataError(
                    f"{path}: expected a safetensors file, found a header length of {length} in {size} bytes"
                )
            try:
                header: dict[str, Any] = json.loads(stream.read(length))
            except (ValueError, RecursionError) as error:
                raise BeamDataError(f"{path}: expected a safetensors header, found invalid JSON ({error})") from error
        if not isinstance(header, dict):
            raise BeamDataError(f"{path}: expected a safetensors header, found a {type(header).__name__} as such")
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            try:
                kind, shape, (start, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
            except (KeyError, TypeError, ValueError):
                kind, shape, start, end = "", (None,), None, None
            if not all(type(number) is int and number >= 0 for number in (*shape, start, end)):
                raise BeamDataError(
                    f"{path}, tensor '{name}': expected dtype, shape and data_offsets, found {str(entry)[:120]}"
                )
            dtype = _SAFETENSORS_DTYPES.get(kind)
            if dtype is None:
                raise BeamDataError(f"{path}, tensor '{name}': expected F16 or F32, found {kind[:20]}; convert it")
            if end - start != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
                raise BeamDataError(
                    f"{path}, tensor '{name}': expected {shape} {dtype}, found bytes {start} to {end} of {size}"
                )
            if 0 in shape:  # nothing to map
                raise BeamDataError(f"{path}, tensor '{name}': expected rows and a width, found the shape {shape}")
            mapped[name] = _Mapped(os.path.abspath(path), dtype.str, shape, 8 + length + start)
        return cls._from_mapped(mapped, str(path))

    @classmethod
    def _from_mapped(cls, mapped: dict[str, _Mapped], source: str) -> EmbeddingStore:
        try:
            store = cls({name: place.open() for name, place in mapped.items()})
        except BeamDataError as error:
            raise BeamDataError(f"{source}: {error}") from None
        store._mapped = mapped
        return store

    def __getstate__(self) -> dict[str, Any]:
        # a store is either all mapped or all in memory
        if self._mapped:
            return {"mapped": self._mapped}
        return {"arrays": self._arrays | {f"{name}{_ROWS}": index for name, index in self._index.items()}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._mapped = state.get("mapped", {})
        self._set(state.get("arrays") or {name: place.open() for name, place in self._mapped.items()})

    def __len__(self) -> int:
        return self._rows_of(next(iter(self._arrays)))

    def __repr__(self) -> str:
        return f"EmbeddingStore(rows={len(self)}, widths={self.widths})"

    def __getitem__(self, name: str) -> np.ndarray:
        """The whole (N, width) array of a feature in the type it has on disk: mapped, or put together if rows are
        shared."""
        self._check_names([name])
        return self._arrays[name][self._index[name]] if name in self._index else self._arrays[name]

    @property
    def names(self) -> list[str]:
        """Names of the features, in the order they were given."""
        return list(self._arrays)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each feature."""
        return {name: array.shape[1] for name, array in self._arrays.items()}

    def width(self, names: Sequence[str]) -> int:
        """Width of these features side by side, as `gather` returns them."""
        self._check_names(names)
        return sum(self._arrays[name].shape[1] for name in names)

    def gather(self, ids: Iterable[int] | np.ndarray, names: Sequence[str]) -> np.ndarray:
        """Rows of the named features side by side, as float32: (len(ids), sum of widths).

        Raises:
            [`BeamDataError`]: an id has no row, a name is not there, or a row holds a NaN, an infinity or a number
                beyond float32.
        """
        rows = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        self.check_ids(rows)
        out = torch.empty(len(rows), self.width(names))
        for name, part in zip(names, out.split([self.widths[name] for name in names], dim=1), strict=True):
            taken = self._arrays[name][self._index[name][rows] if name in self._index else rows]
            if not taken.dtype.isnative or taken.dtype.itemsize > 8:  # no types of torch
                with np.errstate(over="ignore"):
                    taken = taken.astype(np.float32)
            part.copy_(torch.from_numpy(taken))  # from float16 five times as fast as numpy
            if not part.sum().isfinite():  # or large numbers
                bad = ~part.isfinite().all(1).numpy()
                if bad.any():
                    _refuse_rows(name, np.unique(rows[bad]))
        return out.numpy()

    def check_ids(self, ids: np.ndarray) -> None:
        """Raise an error that names the ids that have no row."""
        outside = ids[(ids < 0) | (ids >= len(self))]
        if len(outside):
            shown = ", ".join(map(str, np.unique(outside)[:5]))
            raise BeamDataError(
                f"row ids must be from 0 to {len(self) - 1}, found {len(np.unique(outside))} others: {shown}; "
                "do the embeddings belong to this log's split?"
            )

    def non_finite_rows(self, name: str) -> np.ndarray:
        """Ids of the rows of a feature that hold a NaN or an infinity; reads the whole array, block by block."""
        self._check_names([name])
        array = self._arrays[name]
        blocks = range(0, len(array), _CHECK_ROWS)
        bad = np.concatenate(
            [start + np.flatnonzero(~np.isfinite(array[start : start + _CHECK_ROWS]).all(axis=1)) for start in blocks]
        )
        return np.flatnonzero(np.isin(self._index[name], bad)) if name in self._index else bad

    def check_finite(self, names: Sequence[str] | None = None) -> None:
        """Raise an error that names the feature and rows that hold a NaN or an infinity."""
        for name in self.names if names is None else names:
            rows = self.non_finite_rows(name)
            if len(rows):
                _refuse_rows(name, rows)

    def _check_names(self, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise ValueError(f"names must be a list of features, got the string {names!r}")
        unknown = [name for name in names if name not in self._arrays]
        if unknown or not names:
            raise BeamDataError(f"expected names of embeddings among {self.names}, found {unknown or list(names)}")


def _refuse_rows(name: str, rows: np.ndarray) -> NoReturn:
    shown = ", ".join(map(str, rows[:5]))
    raise BeamDataError(
        f"embeddings '{name}': expected finite numbers, found NaN or infinity in {len(rows)} rows: {shown}"
    )
