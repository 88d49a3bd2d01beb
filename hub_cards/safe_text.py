"""What strangers wrote, made harmless for a card: text for Markdown, words for a command, numbers that are numbers."""

import html
import math
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from markupsafe import Markup

from mxd.data.documents import DATA_ENDINGS

from .reading import texts

UNKNOWN = "–"
MAX_TEXT = 200
MAX_NAMES = 20

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def plain(value: Any) -> str:
    """One line of visible characters, at most `MAX_TEXT` of them."""
    text = value if isinstance(value, str) else "" if finite(value) is None else str(value)
    text = "".join(character if character.isprintable() else " " for character in text[: MAX_TEXT + 1])
    return text.strip() if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def escaped(value: Any) -> Markup:
    """For Markdown and HTML, in a table too: what could be markup becomes a character reference."""
    if isinstance(value, Markup):
        return value
    text = html.escape(plain(value) or UNKNOWN)
    # An underscore within a word is no emphasis, and names have many.
    return Markup(re.sub(r"[`|\\*\[\]~${}@!]|(?<!\w)_|_(?!\w)|^[#+=-]", lambda match: f"&#{ord(match[0])};", text))


def argument(value: Any) -> Markup:
    """For blocks of code, where there are no references: what is neither a word nor harmless becomes `_`."""
    return Markup(re.sub(r"[^\w./:+@,=%*\[\]-]", "_", plain(value)).lstrip("-"))


def quoted(value: Any) -> str:
    """For a shell, which would expand a glob."""
    return shlex.quote(str(argument(value)))


def finite(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def formatted(value: Any, style: str = ".3f", factor: float = 1.0, unit: str = "") -> Markup:
    """A number in a format, `UNKNOWN` where there is none, few digits for what no measurement gives."""
    number = finite(value)
    if number is None:
        return Markup(UNKNOWN)
    number *= factor
    return Markup(f"{number:{style if abs(number) < 1e15 else '.3g'}}{unit}")


def percentage(value: Any) -> Markup:
    """A share, in percent."""
    return formatted(value, ".1f", 100, " %")


def get_nested(value: Any, *keys: str) -> Any:
    """`value[keys[0]][keys[1]]…`, None where there is no such thing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def last_part(path: str) -> str:
    """Of a path or URL, what says nothing of the folders that it is in."""
    return PureWindowsPath(path.split("?", maxsplit=1)[0] if "://" in path else path).name or "a local folder"


def dataset_id(name: str) -> str | None:
    """The Hub id that a data set's name is, or None for what may be a path: as `trainers.load_text` tells them."""
    on_hub = len(name) <= MAX_TEXT and _HUB_ID.fullmatch(name) and not name.lower().endswith(DATA_ENDINGS)
    return name if on_hub and not Path(name).exists() else None


def dataset_names(names: Any) -> list[str]:
    """Names without this machine's folders."""
    shown = [dataset_id(name) or plain(last_part(name)) for name in texts(names)]
    return [*shown[:MAX_NAMES], f"and {len(shown) - MAX_NAMES} more"] if len(shown) > MAX_NAMES else shown
