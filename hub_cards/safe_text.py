"""Make untrusted values harmless: text for Markdown, words for a shell command, and numbers that are finite.

The files of a decomposition may come from a stranger, and a card must not show paths of the machine that made it.
"""

import html
import math
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from markupsafe import Markup

from mxd.data_files import DATA_ENDINGS, is_data_file

UNKNOWN = "–"
MAX_TEXT = 200

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
# Fields whose value is a Hub id or else a path: of data, a model, a decomposition or a checkpoint.
_NAMING = ("dataset", "heldout_dataset", "model", "decomposition", "base_model_name_or_path", "best_model_checkpoint")
# In other fields a path is recognised by its start, by a second slash, or by a slash and the ending of a data file.
_LOCAL = re.compile(
    r"/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\|file:|[^\s:]*[/\\][^\s:]*[/\\]|[^\s:]+[/\\][^\s:]+("
    + "|".join(map(re.escape, DATA_ENDINGS))
    + ")$",
    re.IGNORECASE,
)


def strings_in(value: Any) -> list[str]:
    """Return the strings of a list, or a string as a list of one; an empty list for anything else."""
    if isinstance(value, str):
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def get_nested(value: Any, *keys: str) -> Any:
    """Return `value[keys[0]][keys[1]]…`, or None if a level is missing or is not a mapping."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def one_line(value: Any) -> str:
    """Return a string or number as one line of at most `MAX_TEXT` printable characters."""
    text = value if isinstance(value, str) else "" if finite_number(value) is None else str(value)
    text = "".join(character if character.isprintable() else " " for character in text[: MAX_TEXT + 1])
    return text.strip() if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def escape_markdown(value: Any) -> Markup:
    """Escape a value for Markdown and HTML, also inside a table; `Markup` is already safe and is returned as it is."""
    if isinstance(value, Markup):
        return value
    text = html.escape(one_line(value) or UNKNOWN)
    # An underscore inside a word is not emphasis, and many names have one.
    return Markup(re.sub(r"[`|\\*\[\]~${}@!]|(?<!\w)_|_(?!\w)|^[#+=-]", lambda match: f"&#{ord(match[0])};", text))


def code_word(value: Any) -> Markup:
    """Return one word for a block of code, which knows no character references: other characters become `_`."""
    return Markup(re.sub(r"[^\w./:+@,=%*\[\]-]", "_", one_line(value)).lstrip("-"))


def finite_number(value: Any) -> float | None:
    """Return a finite number as a float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def format_number(value: Any, style: str = ".3f") -> Markup:
    """Format a number; `UNKNOWN` without one, and few digits if it is absurdly large."""
    number = finite_number(value)
    return Markup(UNKNOWN if number is None else f"{number:{style if abs(number) < 1e15 else '.3g'}}")


def format_percent(value: Any, style: str = ".1f") -> Markup:
    """Format a fraction in percent."""
    number = finite_number(value)
    return Markup(UNKNOWN) if number is None else format_number(100 * number, style) + " %"


def last_path_part(path: str) -> str:
    """Return the last part of a path or URL, which names none of its folders."""
    return PureWindowsPath(path.split("?", maxsplit=1)[0] if "://" in path else path).name or "a local folder"


def is_hub_id(name: str, commit: str | None = None) -> bool:
    """Return whether a name has the form of a Hub id and is not a folder of this machine, which has no commit."""
    return len(name) <= MAX_TEXT and HUB_ID.fullmatch(name) is not None and (bool(commit) or not Path(name).is_dir())


def is_dataset_id(name: str) -> bool:
    """Return whether a name is a dataset's Hub id with a user (`user/name`), and no path."""
    return "/" in name and is_hub_id(name) and not is_data_file(name) and not Path(name).exists()


def without_folders(value: Any, field: str = "") -> Any:
    """Return a JSON value, which `field` holds, with every local path in it cut to its last part."""
    if isinstance(value, dict):
        return {key: without_folders(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item, field) for item in value]
    if not isinstance(value, str):
        return value
    name = value.partition("@")[0] if field == "decomposition" else value  # user/repo@revision
    local = not is_dataset_id(name) if field in _NAMING else _LOCAL.match(value)
    return last_path_part(value) if local else value
