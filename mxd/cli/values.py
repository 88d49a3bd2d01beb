"""Values of options: from the command line and from YAML, to what the dataclass takes. Both are read alike."""

import re
from collections.abc import Sequence
from dataclasses import Field
from itertools import chain
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer

from mxd.data_files import is_data_file


def option_name(name: str) -> str:
    """`num_experts` → `--num-experts`."""
    return f"--{name.replace('_', '-')}"


def kind_of(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the type of a field, and the values that it may have instead: None, or a word such as "all"."""
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, ()
    kind, *others = get_args(annotation)
    words = [get_args(other) if get_origin(other) is Literal else (None,) for other in others]
    return kind, tuple(chain.from_iterable(words))


def convert(field: "Field[Any]", annotation: Any, value: Any) -> Any:
    """Return the value of a field from what a user wrote: `"1M"`, `"4-7,10"`. Raise `ValueError` if it does not fit."""
    kind, others = kind_of(annotation)
    if value in others:
        return value
    if kind is bool or get_origin(kind) is dict:
        if not isinstance(value, get_origin(kind) or kind):
            raise ValueError(f"{value!r} is {'neither true nor false' if kind is bool else 'no mapping of names'}")
        return value
    if field.metadata.get("count") or kind == list[int]:
        return parse_numbers(value, others) if kind == list[int] else parse_count(value)
    if kind == list[str]:
        several = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        return [part.strip() for one in several for part in one.split(",")] if field.metadata.get("commas") else several
    if kind in (int, float):
        return _number(kind, value, field.metadata.get("minimum"))
    if get_origin(kind) is Literal and (value := str(value).replace("-", "_")) not in get_args(kind):
        raise ValueError(f"{value!r} is not one of {', '.join(get_args(kind))}")
    return str(value)


def _number(kind: type, value: Any, least: float | None) -> Any:
    try:
        number = kind(str(value))  # int(1.5) is 1
    except ValueError:
        raise ValueError(f"{value!r} is no {'whole ' if kind is int else ''}number") from None
    if least is not None and number < least:
        raise ValueError(f"{number} is less than {least}")
    return number


def parse_count(value: Any) -> int:
    """`"480M"` → 480,000,000; also k, B and plain digits. Raise `ValueError` if it is no such number, or 0."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", str(value).replace("_", "").lower())
    count = int(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]]) if match else 0
    if count < 1:
        raise ValueError(f"{str(value)!r} is no number of tokens: write 500000, 500k, 1.5M or 1B")
    return count


def parse_numbers(value: Any, others: Sequence[Any] = ()) -> list[int]:
    """`8`, `"4,8"`, `"4-7,10"` or a list of those → numbers. Raise `ValueError`, which names `others`, for the rest."""
    numbers: list[int] = []
    for part in ",".join(map(str, value if isinstance(value, list) else [value])).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        between = range(int(match[1]), int(match[2] or match[1]) + 1) if match else ()
        if not between:
            words = "".join(f", or {word}" for word in others if word)
            raise ValueError(f"{value!r} is no list of numbers: write 8, 4,8 or 4-7{words}")
        numbers.extend(between)
    return numbers


def read_config(path: str, known: dict[str, "Field[Any]"], hints: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a YAML file sets."""
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(content, dict):
        raise typer.BadParameter(f"{path} must hold names of options and their values, such as tokens: 1M")
    if unknown := [str(name) for name in content if name not in known]:
        raise typer.BadParameter(f"{path} sets {', '.join(unknown)}, which is no option of this command")
    found = {}
    for name, value in content.items():
        try:
            found[name] = convert(known[name], hints[name], value)
        except ValueError as error:
            raise typer.BadParameter(f"{path}: {name}: {error}") from None
    return found


def split_files(arguments: list[str], dataset: list[str], heldout: list[str]) -> tuple[list[str], list[str]]:
    """Return positional arguments without the files that a shell made of `--dataset *.parquet`, and the dataset."""
    files = [name for name in arguments if is_data_file(name) or Path(name).is_file()]
    if files and not dataset:
        raise typer.BadParameter(f"{files[0]} is a data file: pass it with --dataset")
    if files and heldout:
        raise typer.BadParameter(f"is {files[0]} to be trained on, or held out? quote the globs of both options")
    return [name for name in arguments if name not in files], dataset + files
