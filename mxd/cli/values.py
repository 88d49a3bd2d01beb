"""Values of options: from the command line and from YAML, to what the dataclass takes. Both are read alike."""

import re
from dataclasses import MISSING, Field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer


def option_name(name: str) -> str:
    """`num_experts` → `--num-experts`."""
    return f"--{name.replace('_', '-')}"


def kind_of(annotation: Any) -> tuple[Any, bool]:
    """Return the type of a field without None, and whether it may be None."""
    if get_origin(annotation) in (Union, UnionType):
        (kind,) = [part for part in get_args(annotation) if part is not type(None)]
        return kind, True
    return annotation, False


def convert(field: "Field[Any]", annotation: Any, value: Any) -> Any:
    """Return the value of a field from what a user wrote: `"1M"`, `"4-7,10"`, or the value itself.

    Raises:
        ValueError: the value does not fit; the message says why.
    """
    kind, optional = kind_of(annotation)
    if value is None and optional:
        return None
    if kind is bool or get_origin(kind) is dict:
        if not isinstance(value, get_origin(kind) or kind):
            raise ValueError(f"{value!r} is {'neither true nor false' if kind is bool else 'no mapping of names'}")
    elif kind == list[int]:
        value = parse_numbers(value)
    elif kind == list[str]:
        value = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        if field.metadata.get("commas"):
            value = [part.strip() for one in value for part in one.split(",")]
    elif field.metadata.get("count"):
        value = parse_count(value)
    elif kind in (int, float):
        value = _number(kind, value, field.metadata.get("minimum"))
    else:
        value = str(value)
        if get_origin(kind) is Literal and (value := value.replace("-", "_")) not in get_args(kind):
            raise ValueError(f"{value!r} is not one of {', '.join(get_args(kind))}")
    return value


def _number(kind: type, value: Any, least: float | None) -> Any:
    try:
        number = kind(value)
    except (TypeError, ValueError):
        number = None
    if number is None or isinstance(value, bool) or (isinstance(value, float) and number != value):
        raise ValueError(f"{value!r} is no {'whole ' if kind is int else ''}number")
    if least is not None and number < least:
        raise ValueError(f"{number} is less than {least}")
    return number


def parse_count(value: Any) -> int:
    """`"480M"` → 480,000,000; also k, B, plain digits, and commas between thousands.

    Raises:
        ValueError: it is no such number, or less than 1.
    """
    text = str(value)
    match = re.fullmatch(r"((?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d+)?)\s*([kKmMbB]?)", text.replace("_", "").strip())
    if not match:
        comma = " (a comma stands between thousands, a point before decimals)" if "," in text else ""
        raise ValueError(f"{text!r} is no number of tokens: write 500000, 500k, 1.5M or 1B{comma}")
    count = int(float(match[1].replace(",", "")) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2].lower()])
    if count < 1:
        raise ValueError("at least one token is needed")
    return count


def parse_numbers(value: Any) -> list[int]:
    """`8`, `"4,8"`, `"4-7,10"` or a list of those → numbers.

    Raises:
        ValueError: it is no list of numbers, or a range runs backwards.
    """
    numbers: list[int] = []
    parts = [part for one in (value if isinstance(value, list) else [value]) for part in str(one).split(",")]
    for part in parts:
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"{value!r} is no list of numbers: write 8, 4,8 or 4-7")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part.strip()!r} runs backwards: write {last}-{first}")
        numbers.extend(range(first, last + 1))
    return numbers


def read_config(path: str, known: dict[str, "Field[Any]"], hints: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a YAML file sets.

    Raises:
        typer.BadParameter: it cannot be read, or has an unknown key or a value that does not fit.
    """
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
    """Tell names from the files that a shell made of `--dataset *.parquet`.

    Returns:
        Positional arguments, and the dataset with these files.

    Raises:
        typer.BadParameter: it is not clear that the files belong to `--dataset`.
    """
    from mxd.hub_cards.safe_text import DATA_ENDINGS  # imports torch, which --help does not need

    files = [name for name in arguments if Path(name).suffix.lower() in DATA_ENDINGS]
    if files and not dataset:
        raise typer.BadParameter(f"{files[0]} is a data file: pass it with --dataset")
    if files and heldout:
        raise typer.BadParameter(f"is {files[0]} to be trained on, or held out? quote the globs of both options")
    return [name for name in arguments if name not in files], dataset + files


def required(field: "Field[Any]") -> bool:
    """Return whether a field has no default."""
    return field.default is MISSING and field.default_factory is MISSING
