"""The docs: numbers come from results files, and every option, file and Python name exists."""

import ast
import importlib
import inspect
import json
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import typer
from build_docs import cli_page, python_pages, undocumented
from pages import fill

import mxd
from mxd.cli.jobs import COMMANDS
from mxd.cli.values import option_name

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FOREIGN_NAMES = {"ref_model"}  # an argument of TRL's DPOTrainer
ROOMS = {"modeling_mxd", "hub_cards", "trainers", "mxd", "benchmarks", "tests", "notebooks", "scripts", "docs"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs").with_suffix(""))


@cache
def made_pages() -> set[str]:
    """Return the pages that scripts/build_docs.py makes."""
    return {"changelog.md", "reference/cli.md"} | {f"reference/python/{name}" for name in python_pages()}


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r'"([\w./-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    written = {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert written <= listed, "name new pages in zensical.toml"
    assert listed - written == made_pages()


def test_the_version_is_the_same_everywhere():
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1] == version


def test_tables_of_pages_are_made_from_results():
    marks = [mark for page in PAGES for mark in re.findall(r"<!-- table: .*? -->", page.read_text())]
    assert len(marks) > 10 and len(set(marks)) == len(marks)
    filled = [fill(mark) for mark in marks]
    lists = [mark for mark, text in zip(marks, filled, strict=True) if not text.count("|---|")]
    assert lists == ["<!-- table: layers, texts -->"] and "\n- *MxD*: " in fill(lists[0])
    cells = "| MxD | 204 k | +0.0005 ± 0.0003 | 0.0011 | 0.016 | 101 % | 0.0 % |"
    assert cells in fill("<!-- table: recipe, K = 32, one pass -->")
    cells = "| 2, means over all tokens | 2.9 %, 476 × | +0.061 ± 0.028 | 0.074 | 0.241 | 347 % |"
    assert cells in fill("<!-- table: massive tokens -->")
    with pytest.raises(KeyError, match="no such table"):
        fill("<!-- table: no such table -->")


def test_every_public_name_and_option_is_in_the_reference():
    assert undocumented() == []
    pages = python_pages()
    text = "".join(pages.values())
    assert all(f"#mxd.{name})" in pages["index.md"] for name in mxd.__all__)
    assert all(f"::: mxd.{name}\n" in text or f"{{#mxd.{name}}}" in text for name in mxd.__all__)
    page = cli_page()
    for name, command in COMMANDS.items():
        section = page.partition(f"\n## mxd {name}\n")[2].partition("\n## ")[0]
        for one in fields(command.options):
            names = (f"`{option_name(one.name)}`", f"`{one.name}:`", f"`{one.name}`")
            assert any(each in section for each in names), (name, one.name)


def test_a_public_name_without_a_docstring_is_found(monkeypatch):
    monkeypatch.setattr(mxd.MxDModel, "layer", lambda self: None)
    assert undocumented() == ["MxDModel.layer"]


def test_the_size_of_a_repo_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "sharing.json").read_text())
    page = (ROOT / "docs" / "how-to" / "share.md").read_text()
    assert f"| {results['three_layers']['weight_bytes'] / 1e6:.0f} MB of weights |" in page
    assert f"| {results['spliced']['seconds']:.2f} s, {results['base']['seconds']:.2f} s |" in page
    assert f"| {100 * results['transferred_share']:.1f} % of the whole |" in page


def commands() -> dict[str, set[str]]:
    """Return the options of every command."""
    from mxd.cli.main import app

    found = typer.main.get_command(app).commands
    return {
        name: {"--help"}.union(*([*parameter.opts, *parameter.secondary_opts] for parameter in command.params))
        for name, command in found.items()
    }


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*(?![\w-])", text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_have_the_options_that_a_page_names(page):
    known = commands()
    others = (
        r"^    lm_eval .*$|(?<=^    )torchrun .* -m (?=mxd )|`--model_args`|`--shutdown-timeout`"  # options of others
    )
    text = re.sub(others, "", page.read_text(), flags=re.MULTILINE)
    lines = re.findall(r"^    mxd ([a-z][a-z-]*)((?:[^\n]*\\\n)*[^\n]*)", text, flags=re.MULTILINE)
    for command, arguments in lines + re.findall(r"`mxd ([a-z][a-z-]*)([^`]*)`", text):
        assert options_in(arguments.partition(" #")[0]) <= known[command], command
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    everywhere = {"--version", "--debug"}.union(*known.values()) | set(re.findall(r'"(--[a-z-]+)"', benchmarks))
    assert {option for option in options_in(text) if option.startswith("--")} <= everywhere


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_and_links_of_a_page_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:`|`python )([\w./-]+/[\w.-]+)[^`\n]*`", text):
        if name.split("/")[0] in ROOMS:
            assert (ROOT / name).exists(), name
    for name, anchor in re.findall(r"\]\(([\w./-]+\.(?:md|png|svg))(?:#([\w-]+))?\)", text):
        linked = (page.parent / name).resolve()
        if str(linked.relative_to(ROOT / "docs")) in made_pages():
            continue
        assert linked.is_file(), name
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_names_of_a_page_exist(page):
    text = page.read_text()
    blocks = [ast.parse(block) for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    blocks += [ast.parse(span) for span in spans if re.fullmatch(r"[A-Za-z_]+\(.*=.*\)", span)]
    for node in (node for block in blocks for node in ast.walk(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mxd":
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in mxd.__all__:
            parameters = inspect.signature(getattr(mxd, node.func.id)).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
                assert {keyword.arg for keyword in node.keywords} <= set(parameters), ast.unparse(node)
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path != Path(__file__)]
    sources = "".join(path.read_text() for path in files)
    names = {name for span in spans for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", span)}
    assert names - FOREIGN_NAMES <= set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", sources))
