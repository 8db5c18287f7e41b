"""Images of examples, decoded."""

from __future__ import annotations

import io
from typing import Any


def open_image(image: Any) -> Any:
    """
    An image as RGB, upright, decoded to the end.

    Args:
        image (`Path`, `str`, `bytes` or `PIL.Image.Image`):
            File, encoded bytes, or an image.

    Returns:
        `PIL.Image.Image`.

    Raises:
        `OSError`, `SyntaxError` (PIL's, for some broken PNGs): it cannot be read.
        ValueError: it is larger than PIL opens.
    """
    from PIL import Image, ImageOps  # only tasks with images need it

    try:
        if not isinstance(image, Image.Image):
            image = Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)
        return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error
