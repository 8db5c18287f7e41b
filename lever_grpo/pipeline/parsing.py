"""Arguments from YAML and the command line."""

from __future__ import annotations

import argparse
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser


MAX_CONFIG_BYTES = 1 << 20
MAX_DEPTH = 20


class _Parser(TrlParser):
    """Options are not abbreviated, and mistakes are exceptions, as those in a YAML file are."""

    def __init__(self, classes: Sequence[Any] = (), **options: Any) -> None:
        super().__init__(list(classes), allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the options.")


def make_parser(classes: Sequence[Any], prog: str | None = None) -> TrlParser:
    """The parser of `--config` and of the fields of data classes."""
    parser = _Parser(classes, prog=prog)
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line wins.")
    return parser


def parse_dataclasses(classes: Sequence[Any], arguments: Sequence[str], prog: str | None = None) -> tuple[Any, ...]:
    """
    Instances of data classes from `--config FILE` (YAML), and on top of it the command line.

    Raises:
        ValueError: as [`read_values`] does, and where a class refuses its values.
    """
    return to_dataclasses(classes, read_values(classes, arguments, prog))


def to_dataclasses(classes: Sequence[Any], values: argparse.Namespace) -> tuple[Any, ...]:
    """Instances of data classes from what [`read_values`] found."""
    return tuple(cls(**{f.name: getattr(values, f.name) for f in fields(cls) if f.init}) for cls in classes)


def read_values(classes: Sequence[Any], arguments: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    """
    Values of the fields of data classes, from `--config FILE` (YAML), and on top of it the command line.

    Raises:
        ValueError: for a file that is no YAML mapping, a key or an option that no class has, a value of another type,
            and one that is not among the choices of its field.
    """
    only_config = _Parser(add_help=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(arguments)[0].config
    parser = make_parser(classes, prog)
    if path is not None:
        config = read_config(path)
        _check(config, path, parser, {name: hint for cls in classes for name, hint in get_type_hints(cls).items()})
        parser.set_defaults_with_config(**config)
    values, unknown = parser.parse_known_args(arguments)
    if unknown:
        name = unknown[0].split("=")[0]  # without its value, which may be a secret
        raise ValueError(
            f"{name!r} is none of the options{_meant(name, parser._option_string_actions)}; --help lists them."
        )
    return values


def _check(config: dict[str, Any], path: str, parser: TrlParser, hints: dict[str, Any]) -> None:
    """What the parser checks on the command line only; and it would set the environment by the key `env`."""
    choices = {action.dest: action.choices for action in parser._actions if action.choices is not None}
    for name, value in config.items():
        if name not in hints:
            raise ValueError(f"{path}: the key {name!r} is no argument{_meant(name, hints)}; remove or mend it.")
        items = value if isinstance(value, list) else [value]
        if not _fits(value, hints[name]):
            booleans = any(isinstance(item, bool) for item in items)
            quote = " Quote yes, no, on and off, which YAML takes for booleans." * booleans
            raise ValueError(f"{path}: {name}={_short(value)} is no {_name(hints[name])}; give one.{quote}")
        if name in choices and value is not None and not all(item in choices[name] for item in items):
            raise ValueError(f"{path}: {name}={_short(value)} must be of {', '.join(map(str, choices[name]))}.")


def _meant(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f", {close[0]!r} is" if close else ""


def read_config(path: str | Path) -> dict[str, Any]:
    r"""
    The mapping in a YAML (or JSON) file of plain values.

    Tags that name Python objects are refused, and so are keys that stand twice, which YAML would let pass, and
    aliases, a few lines of which can stand for more values than fit into memory.

    Raises:
        ValueError: if the file is not such a mapping; the message names the file and, where it can, the line.

    Example:

    ```python
    >>> import pathlib, tempfile
    >>> from lever_grpo.pipeline.parsing import read_config
    >>> path = pathlib.Path(tempfile.mkdtemp(), "run.yaml")
    >>> _ = path.write_text("task: emoji\nnum_shots: 2\n")
    >>> read_config(path)
    {'task': 'emoji', 'num_shots': 2}

    ```
    """
    with open(path, "rb") as stream:
        content = stream.read(MAX_CONFIG_BYTES + 1)
    if len(content) > MAX_CONFIG_BYTES:
        raise ValueError(f"{path}: expected a config of at most {MAX_CONFIG_BYTES:,} bytes, found a larger file.")
    try:
        config = yaml.load(content.decode("utf-8-sig"), Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML in UTF-8, found {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"{path}: expected a mapping of arguments to values, found {_short(config)}.")
    return config


class _PlainLoader(yaml.SafeLoader):
    """YAML without aliases, keys that repeat, and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias in line {line}; write its value out")
        if self.depth == MAX_DEPTH:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels in line {line}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise yaml.YAMLError(f"the keys {twice} twice in the mapping of line {node.start_mark.line + 1}; keep one")
        return super().construct_mapping(node, deep)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML can be one of the type; texts of numbers are, as on the command line."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) is Literal:
        return not isinstance(value, (list, dict))  # the parser knows the choices
    if get_origin(hint) is list or hint is list:
        if not isinstance(value, list):
            return False
        parts = get_args(hint)
        if {int, float} & set(parts) and any(isinstance(item, str) for item in value):
            return False  # the parser turns texts into numbers, but not those in a list
        return all(_fits(item, part) for item in value for part in parts)
    if get_origin(hint) is dict or hint is dict:
        return isinstance(value, dict)
    if hint in (int, float):
        if isinstance(value, str):
            try:
                hint(value)
            except ValueError:
                return False
            return True
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    if hint is bool:
        return isinstance(value, (bool, str))  # the parser knows "yes" and the like
    if hint is type(None):
        return value is None
    return hint is Any or isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else shown[:117] + "..."
