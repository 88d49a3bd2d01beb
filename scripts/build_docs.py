"""Build the documentation site in build/site: python scripts/build_docs.py

Copies docs/ into build/docs, adds the tables of results files and the pages that are made from the code, and runs
Zensical in strict mode. Broken links and anchors, missing references and public names without a docstring fail.
"""

import inspect
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments

import mxd
from mxd.cli.commands import _default, _metavar
from mxd.cli.jobs import COMMANDS
from mxd.cli.values import kind_of, option_name
from mxd.jobs.options import PANELS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from pages import fill  # noqa: E402

BUILD = ROOT / "build"
ROOMS = {
    "modeling_mxd": ("Layers and models", "Load, splice and build decompositions. Needs torch and transformers alone."),
    "base": ("Base models", "Load base models and record what their MLPs read and write."),
    "data": ("Text", "Read documents and pack them into rows of tokens."),
    "evaluation": ("Evaluation", "Measure faithfulness, and how experts are used."),
    "experts": ("Experts", "Read what experts do, and judge what they mean."),
    "trainers": ("Trainers", "Train decompositions, by distillation or end to end."),
    "jobs": ("Commands", "Run what the commands run. [Commands](../cli.md) lists the fields of the options."),
    "interchange": ("Other libraries", "Exchange transcoders with SAELens, circuit-tracer and sparsify."),
    "hub_cards": ("Hub", "Share decompositions and find others'."),
}


def public_names() -> Iterator[tuple[str, str, Any]]:
    """Yield room, name and object of every public name."""
    for name in mxd.__all__:
        found = getattr(mxd, name)
        yield found.__module__.split(".")[1], name, found


def undocumented() -> list[str]:
    """Return public names, and public members of public classes, that have no docstring of their own or a base's."""
    missing = []
    for _, name, found in public_names():
        members = [member for member in vars(found) if not member.startswith("_")] if inspect.isclass(found) else []
        for path, each in [(name, found), *((f"{name}.{member}", getattr(found, member)) for member in members)]:
            callable_here = inspect.isroutine(each) or inspect.isclass(each) or isinstance(each, property)
            if callable_here and not inspect.getdoc(each):
                missing.append(path)
    return missing


def python_pages() -> dict[str, str]:
    """Return a page for each room, with the docstrings of its public names, and a page that lists all names."""
    names = sorted(public_names())
    pages, index = {}, ["# Python\n\nAll of these are in `mxd`: `from mxd import MxDModel`.\n"]
    for room, (title, about) in ROOMS.items():
        of_room = [(name, found) for where, name, found in names if where == room]
        rows = [f"| [`{name}`]({room}.md#mxd.{name}) | {_summary(found)} |" for name, found in of_room]
        index.append(f"## {title}\n\n{about}\n\n| name | |\n|---|---|\n" + "\n".join(rows) + "\n")
        blocks = [f"::: mxd.{name}\n" for name, found in of_room if not _is_options(found)]
        pages[f"{room}.md"] = f"# {title}\n\n{about}\n\n" + "\n".join(blocks) + _options_section(of_room)
    return pages | {"index.md": "\n".join(index)}


def _summary(found: Any) -> str:
    return (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ").replace("|", "\\|")


def _is_options(found: Any) -> bool:
    """Return whether a class is described by a table of its fields."""
    return inspect.isclass(found) and (found.__name__.endswith("Options") or issubclass(found, TrainingArguments))


def _options_section(of_room: list[tuple[str, Any]]) -> str:
    text = ""
    for name, found in of_room:
        if not _is_options(found):
            continue
        text += f"\n## {name} {{#mxd.{name}}}\n\n{inspect.getdoc(found)}\n\n"
        commands = [command for command, each in COMMANDS.items() if each.options is found]
        if commands:
            text += f"Its fields are the options of [mxd {commands[0]}](../cli.md#mxd-{commands[0]}).\n"
            continue
        stock = {each.name: each for each in fields(TrainingArguments)}
        changed = [each for each in fields(found) if each is not stock.get(each.name) and "help" in each.metadata]
        changed = [each for each in changed if each.name not in stock or each.default != stock[each.name].default]
        text += "| field | default | |\n|---|---|---|\n"
        text += "".join(
            f"| `{each.name}` | `{each.default!r}` | {_cell(each.metadata['help'])} |\n" for each in changed
        )
    return text


def cli_page() -> str:
    """Return the page of all commands with all their options, as `--help` shows them, and those of YAML alone."""
    text = (
        "# Commands\n\nEvery option is also a key of the YAML file that `--config` names, and a field of the Python "
        "class that is named below. Options without a flag are set there alone.\n\n`mxd --version` shows the version. "
        "With `--debug` after any command an error shows its traceback.\n"
    )
    for name, command in COMMANDS.items():
        known, hints = fields(command.options), get_type_hints(command.options)
        arguments = [each.metadata["argument"] for each in known if "argument" in each.metadata]
        text += f"\n## mxd {name}\n\n    mxd {' '.join([name, *arguments])} [OPTIONS]\n\n"
        text += f"{inspect.getdoc(command.options)}\n\nIn Python: `{command.options.__name__}`.\n\n"
        for panel in PANELS:
            rows = [_option_row(each, hints, command.options) for each in known if each.metadata["panel"] == panel]
            if rows:
                text += f"**{panel}**\n\n| option | |\n|---|---|\n" + "\n".join(rows) + "\n\n"
    return text


def _option_row(one: "Field[Any]", hints: dict[str, Any], options: type) -> str:
    kind, _ = kind_of(hints[one.name])
    default = _default(one)
    about = one.metadata["help"] + (f" [{default}]" if default else "")
    if "argument" in one.metadata:
        shown = f"`{one.metadata['argument']}`, `{one.name}`"
    elif not one.metadata.get("flag", True) or one.name in getattr(options, "yaml_only", ()):
        shown = f"`{one.name}:` in YAML"
    else:
        shown = ", ".join(f"`{each}`" for each in (option_name(one.name), one.metadata.get("alias")) if each)
    if one.default is one.default_factory is MISSING:
        about += " Required."
    value = "" if kind is bool else " " + ", ".join(_metavar(one, kind).split("|"))
    return f"| {shown}{value} | {_cell(about)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;").replace("*", "\\*")


def assemble(pages: Path) -> None:
    """Write all pages of the site into a folder."""
    shutil.rmtree(pages, ignore_errors=True)
    shutil.copytree(ROOT / "docs", pages)
    shutil.copy(ROOT / "CHANGELOG.md", pages / "changelog.md")
    for page in pages.rglob("*.md"):
        page.write_text(fill(page.read_text(encoding="utf-8")), encoding="utf-8")
    (pages / "reference" / "cli.md").write_text(cli_page(), encoding="utf-8")
    folder = pages / "reference" / "python"
    folder.mkdir()
    for name, text in python_pages().items():
        (folder / name).write_text(text, encoding="utf-8")


def main() -> None:
    """Build the site, or exit with the reasons why not."""
    if missing := undocumented():
        sys.exit(f"public names without a docstring: {', '.join(missing)}")
    assemble(BUILD / "docs")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
