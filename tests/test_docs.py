"""The docs: numbers come from results files, and every option, file and Python name exists."""

import ast
import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
RECIPE = ROOT / "benchmarks" / "results" / "recipe.json"
MARK = "<!-- benchmarks/results/recipe.json: {} -->"
# Results were measured under earlier names of two terms of the loss.
EARLIER_NAMES = {"auxiliary transcoder": "sparse code", "min_mean_ablation_error": "expert_share"}
FOREIGN_NAMES = {"ref_model"}  # an argument of TRL's DPOTrainer
ROOMS = {"modeling_mxd", "hub_cards", "trainers", "mxd", "benchmarks", "tests", "notebooks", "scripts", "docs"}


def half_width(row: dict[str, Any]) -> float:
    low, high = row["rise_interval"]
    return (high - low) / 2


COLUMNS = {
    "tokens": lambda row: f"{row['tokens'] / 1e6:.1f} M",
    "products": lambda row: "bfloat16" if row["bf16"] else "float32",
    "held out": lambda row: f"{row['held_out_tokens'] / 1e3:.0f} k",
    "CE rise": lambda row: f"{row['rise']:+.4f} ± {half_width(row):.4f}",
    "KL": lambda row: f"{row['kl']:.4f}",
    "NMSE": lambda row: f"{row['metrics']['nmse']:.3f}",
    "specialised share": lambda row: f"{100 * row['metrics']['specialised_share']:.0f} %",
    "clipped": lambda row: f"{100 * row['metrics']['clipped_specialised_share']:.0f} %",
    "dead": lambda row: f"{100 * row['metrics']['dead_experts']:.1f} %",
    "max. frequency": lambda row: f"{100 * row['metrics']['max_expert_frequency']:.0f} %",
}


def recipe_rows(page: str) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield title of the table, name and cells by column of every row between the marks."""
    title, columns = "", []
    for line in page.partition(MARK.format("begin"))[2].partition(MARK.format("end"))[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("**"):
            title = earlier(line.strip("*"))
        elif line.startswith("|") and not cells[0]:
            columns = cells
        elif line.startswith("|") and not line.startswith("|--"):
            yield title, earlier(cells[0]), dict(zip(columns[1:], cells[1:], strict=True))


def earlier(name: str) -> str:
    for now, before in EARLIER_NAMES.items():
        name = name.replace(now, before)
    return name


@pytest.mark.parametrize("page", ["README.md", "docs/recipe.md"])
def test_the_rows_of_recipe_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text()
    if MARK.format("begin") not in text and page == "README.md":
        pytest.skip("the README shows no recipe table")
    tables = json.loads(RECIPE.read_text())["tables"]
    rows = list(recipe_rows(text))
    assert rows
    for title, name, cells in rows:
        measured = tables[title][name]
        assert cells == {column: COLUMNS[column](measured) for column in cells}, (title, name)


def test_the_rows_of_massive_tokens_are_those_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "massive-tokens.json").read_text())
    page = (ROOT / "docs" / "recipe.md").read_text().partition("\n## Massive tokens\n")[2].partition("\n## ")[0]
    rows = []
    for name, measured in results.items():
        ((layer, metrics),) = measured["layers"].items()
        assert name.startswith(f"layer {layer}, ")
        massive = measured["massive_outputs"]
        cells = [
            name.removeprefix("layer "),
            f"{100 * massive['share']:.2g} %, {massive['factor']:.0f} ×" if massive else "none",
            f"{measured['cross_entropy']['rise']:+.3f} ± {half_width(measured['cross_entropy']):.3f}",
            f"{measured['kl']:.3f}",
            f"{metrics['nmse']:.3f}",
            f"{100 * metrics['expert_share']:.0f} %",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    assert [line for line in page.splitlines() if re.match(r"\| \d", line)] == rows


def test_the_size_of_a_repo_is_that_of_the_results():
    results = json.loads((ROOT / "benchmarks" / "results" / "sharing.json").read_text())
    page = (ROOT / "docs" / "sharing.md").read_text()
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_the_options_that_a_page_names(page):
    known = commands()
    text = re.sub(r"^    lm_eval .*$|`--model_args`", "", page.read_text(), flags=re.MULTILINE)  # another's options
    lines = re.findall(r"^    mxd ([a-z-]+)((?:[^\n]*\\\n)*[^\n]*)", text, flags=re.MULTILINE)
    for command, arguments in lines + re.findall(r"`mxd ([a-z-]+)([^`]*)`", text):
        assert options_in(arguments.partition(" #")[0]) <= known[command], command
    benchmarks = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    everywhere = set().union(*known.values()) | set(re.findall(r'"(--[a-z-]+)"', benchmarks))
    assert {option for option in options_in(text) if option.startswith("--")} <= everywhere


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_and_links_of_a_page_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:`|`python )([\w./-]+/[\w.-]+)[^`\n]*`", text):
        if name.split("/")[0] in ROOMS:
            assert (ROOT / name).exists(), name
    for name, anchor in re.findall(r"\]\(([\w.-]+\.(?:md|png))(?:#([\w-]+))?\)", text):
        linked = page.parent / name
        assert linked.is_file(), name
        if anchor:
            heads = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_names_of_a_page_exist(page):
    import mxd

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
