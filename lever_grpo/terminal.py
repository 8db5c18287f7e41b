"""What may be printed of a file that came from elsewhere."""


def printable(text: str) -> str:
    """
    A text whose control characters are written out, so that it cannot steer the terminal.

    Example:

    ```python
    >>> from lever_grpo.terminal import printable
    >>> printable("naïve \\x1b[2J")
    'naïve \\\\x1b[2J'

    ```
    """
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
