"""Options of the commands that use a decomposition's experts; see `options`."""

# ruff: noqa: RUF009
from dataclasses import dataclass
from typing import Literal

from .options import MEASURE, OUTPUT, option


@dataclass(kw_only=True)
class SteeringOptions:
    """Continue a prompt by the untouched model, and while experts steer it, side by side.

    The expert is named here, or changes are read from a file that `--save` or a `Steering` wrote.
    """

    decomposition: str = option(..., "Folder or Hub id (user/repo[@revision]) of a decomposition.", argument="FOLDER")
    prompt: str = option(..., "Text to continue.", argument="PROMPT")
    expert: int | None = option(None, "Expert to steer by.", MEASURE, minimum=0)
    strength: float = option(1.0, "Strength, in units of the expert's own maximum; with --by scale, a factor.", MEASURE)
    by: Literal["direction", "add", "set", "scale", "ablate"] = option(
        "direction", "Along the expert's direction, or by its coefficient.", MEASURE
    )
    layer: int | None = option(None, "Layer of the expert. [the only one]", MEASURE, minimum=0)
    positions: str = option("all", "Tokens to steer at: all, prompt, generated, 3-9 (without 9) or 3-.", MEASURE)
    steering: str | None = option(None, "JSON file with changes, made before that of --expert.", MEASURE)
    save: str | None = option(None, "JSON file to write the steering into.", OUTPUT)
    new_tokens: int = option(40, "Tokens to generate.", minimum=1)
    temperature: float = option(0.0, "Temperature of sampling; 0 takes the most likely tokens.", minimum=0)
    seed: int = option(0, "Seed of sampling.", flag=False)
    dtype: str = option("float32", "Dtype of the base model: float32, bfloat16 or float16.")


@dataclass(kw_only=True)
class ExploreOptions:
    """Show a page on which to search, read and steer experts; `mxd experts` collects what it shows.

    The page is served to this machine until Ctrl-C, or else exported.
    """

    decomposition: str = option(..., "Folder or Hub id (user/repo[@revision]) of a decomposition.", argument="FOLDER")
    port: int = option(7860, "Port on 127.0.0.1; 0 takes one that is free.", minimum=0)
    export: str | None = option(None, "Instead: write the page into this new folder, for any static host.", OUTPUT)
    space: str | None = option(None, "Instead: push the page as a static Space, user/name, with its texts.", OUTPUT)


@dataclass(kw_only=True)
class InspectOptions:
    """Show which experts are active on the tokens of a text, the most unusual first, and what these experts do.

    Of several texts: the experts that they have in common. What is unusual is known from `mxd experts`, which is run
    first if the decomposition has no experts.safetensors.
    """

    decomposition: str = option(..., "Folder or Hub id (user/repo[@revision]) of a decomposition.", argument="FOLDER")
    texts: list[str] = option(..., "Text to inspect, or several.", argument="TEXT...")
    layer: int | None = option(None, "Layer to inspect. [all]", MEASURE, minimum=0)
    top: int = option(5, "Experts to describe, of each layer.", MEASURE, minimum=1)
    examples: int = option(3, "Contexts of each of them.", MEASURE, minimum=1)
    dtype: str = option("float32", "Dtype of the base model: float32, bfloat16 or float16.")
    output: str | None = option(None, "Folder for inspect.html; - prints JSON. [the decomposition's]", OUTPUT)
