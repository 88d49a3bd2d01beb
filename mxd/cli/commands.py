"""Typer commands made of the dataclasses in `mxd.jobs.options`, the only place where an option is declared."""

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from mxd.jobs.options import MORE, OUTPUT, PANELS

from .values import convert, kind_of, option_name, read_config, split_files

Job = Callable[[Any], None]


def make_command(options: type, job: Job) -> Callable[..., None]:
    """Return the typer command that runs a job with an instance of `options`, whose docstring is the help."""
    known = {one.name: one for one in fields(options)}
    hints = get_type_hints(options)
    hidden = getattr(options, "yaml_only", ())
    shown = [one for one in known.values() if one.metadata.get("flag", True) and one.name not in hidden]
    positional = [one for one in shown if "argument" in one.metadata]
    shown = [one for one in shown if "argument" not in one.metadata]
    shown.sort(key=lambda one: PANELS.index(one.metadata["panel"]))  # stable: a panel keeps the fields' order

    def command(**given: Any) -> None:
        asked = {name: value for name, value in given.items() if value is not None and name in known}
        for name, value in asked.items():
            try:
                asked[name] = convert(known[name], hints[name], value)
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint=option_name(name)) from None
        chosen = read_config(given["config"], known, hints) if given["config"] else {}
        chosen |= asked
        if given.get("arguments"):
            chosen |= _sort_arguments(given["arguments"], positional[0], chosen)
        for one in known.values():
            if one.default is one.default_factory is MISSING and one.name not in chosen:
                raise typer.BadParameter(f"{one.metadata.get('argument') or option_name(one.name)} is missing")
        job(options(**chosen))

    parameters = [_option(one, hints[one.name]) for one in shown]
    text, panel = "YAML file with options of this command; those given here win.", OUTPUT if "output" in known else MORE
    config = typer.Option("--config", help=text, rich_help_panel=panel)
    parameters.append(_parameter("config", str | None, config))
    for number, one in enumerate(positional):
        argument = typer.Argument(metavar=one.metadata["argument"], help=one.metadata["help"], show_default=False)
        # A shell makes several arguments of `--dataset *.parquet`.
        several = list[str] if one.metadata["argument"].endswith("...") else str
        name, kind = ("arguments", list[str]) if "dataset" in known else (one.name, several)
        parameters.insert(number, _parameter(name, kind | None, argument))
    command.__doc__ = options.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


def _sort_arguments(arguments: list[str], target: "Field[Any]", chosen: dict[str, Any]) -> dict[str, Any]:
    """Return the values of `target` and of the dataset that positional arguments give."""
    names, files = split_files(arguments, chosen.get("dataset", []), chosen.get("heldout_dataset", []))
    several = target.metadata["argument"].endswith("...")
    if len(names) > 1 and not several:
        raise typer.BadParameter(f"one {target.name} is expected, got {' and '.join(names)}")
    named = {target.name: names if several else names[0]} if names else {}
    return {**named, "dataset": files} if files else named


def _parameter(name: str, kind: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


def _option(one: "Field[Any]", annotation: Any) -> inspect.Parameter:
    """Return the parameter of a field. All values are read as text, or flags, and converted as those of YAML are."""
    kind, _ = kind_of(annotation)
    names = [option_name(one.name), *([one.metadata["alias"]] if "alias" in one.metadata else [])]
    several = kind == list[str] and not one.metadata.get("commas")
    default = _default(one)
    info = typer.Option(
        *names,
        help=one.metadata["help"] + (f" [{default}]" if default else ""),
        rich_help_panel=one.metadata["panel"],
        metavar=None if kind is bool else _metavar(one, kind),
        show_default=False,
    )
    return _parameter(one.name, (bool if kind is bool else list[str] if several else str) | None, info)


def _metavar(one: "Field[Any]", kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if one.metadata.get("count"):
        return "TOKENS"
    return {int: "INTEGER", float: "NUMBER", list[int]: "NUMBERS"}.get(kind, "TEXT")


def _default(one: "Field[Any]") -> str:
    """Return the default as `--help` shows it; empty where the help says it, or there is none."""
    value = one.default if one.default_factory is MISSING else one.default_factory()
    if one.metadata.get("count") and isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "" if value is MISSING or value is None or isinstance(value, bool) else str(value)
