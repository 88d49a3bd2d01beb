"""Commands and code that messages advise run as they stand."""

import ast
import re
import shlex
from dataclasses import MISSING, fields
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
from commands import run
from factories import random_mxd_model

from mxd import demo
from mxd.cli.jobs import COMMANDS
from mxd.cli.main import app

ROOMS = ["modeling_mxd", "hub_cards", "trainers", "base", "data", "evaluation", "experts", "jobs", "cli"]
LAYER = {"nmse": 0.1, "fvu": 0.1, "l0": 4.0, "dead_experts": 0.0, "expert_share": 0.9, "specialised_share": None}
LOSS = {"untouched": 2.9, "spliced": 2.91, "zero_ablated": 3.05, "recovered": 0.9, "rise_interval": [0.009, 0.011]}
EVALUATION = {"layers": {"4": LAYER}, "cross_entropy": LOSS, "kl": 0.0123, "top1_agreement": 0.955}


def messages():
    """Yield every text in the product that is no docstring, with its file."""
    for room in ROOMS:
        for path in Path(find_spec(f"mxd.{room}").submodule_search_locations[0]).glob("*.py"):
            tree = ast.parse(path.read_text())
            bare = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in bare:
                    yield path, node.value


def options():
    """Return the options of all commands."""
    commands = typer.main.get_command(app).commands.values()
    found = {name for command in commands for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return found | {"--debug", "--version", "--help"}


def test_options_that_messages_name_exist():
    known, named = options(), 0
    for path, text in messages():
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", text):
            assert option in known, (path.name, text)
            named += 1
    assert named > 30


def test_commands_that_messages_name_exist():
    commands = typer.main.get_command(app).commands.keys()
    for path, text in messages():
        for command in re.findall(r"`?\bmxd (?!import )([a-z]+) (?=[A-Z{]|--|$)", text):
            assert command in commands, (path.name, text)
        for names in re.findall(r"pip install ([a-z -]+)", text):
            assert all(distribution(name) for name in names.split()), (path.name, text)


def test_python_names_that_messages_name_exist():
    import mxd

    for path, text in messages():
        for name in re.findall(r"\bmxd\.((?!git)[A-Za-z_]\w*(?:\.\w+)*)\(", text):
            place = mxd
            for part in name.split("."):
                place = getattr(place, part)
            assert place, (path.name, text)


@pytest.mark.parametrize("name", ["plain", "two words", "it's", 'a "quote"', "$HOME;ls"])
def test_the_next_steps_of_a_decomposition_run(tmp_path, monkeypatch, name):
    folder = tmp_path / name
    sizes = {"hidden_size": 192, "output_size": 192, "intermediate_size": 8}
    random_mxd_model([2], base_model_name_or_path=demo.MODEL_NAME, **sizes).save_pretrained(folder)
    monkeypatch.setattr("mxd.jobs.decompose.decompose", lambda options: EVALUATION)
    monkeypatch.setenv("COLUMNS", "400")
    code, out, error = run("decompose", "--output", folder)
    assert code == 0, error
    words, experts = (shlex.split(line.removeprefix("Next:"), comments=True) for line in out.splitlines()[-2:])
    assert words == ["mxd", "evaluate", str(folder), "--dataset", "TEXT"]
    assert experts == ["mxd", "experts", str(folder)]
    (tmp_path / "text.txt").write_text("It was the best of times. " * 40)
    short = ["--tokens", "64", "--context-length", "16"]
    if name == "it's":
        code, out, error = run(*words[1:4], tmp_path / "text.txt", *short)
        assert code == 0, error
        assert not (folder / "figures").exists()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nosuchfolder", "there is no folder nosuchfolder"),
        ("no/such/folder", "there is no folder no/such/folder"),
        ("user/repo", "if it is a repo on the Hub, give a folder with --output"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "experts"])
def test_a_folder_that_is_not_there(command, source, said):
    code, _, error = run(command, source)
    assert code == 1 and said in error


def test_a_decomposition_of_the_base_that_ships_loads_by_its_folder_alone(tmp_path):
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 192, "output_size": 192, "intermediate_size": 8}
    random_mxd_model([2], base_model_name_or_path=demo.MODEL_NAME, **sizes).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.decomposition.config.layers == [2]
    assert model.unsplice().config.num_hidden_layers == 5


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_at_once_what_it_waits_for(name, capsys):
    command = COMMANDS[name]
    required = [one.name for one in fields(command.options) if one.default is one.default_factory is MISSING]
    command._replace(job=lambda options: None).run(command.options(**dict.fromkeys(required, "user/name")))
    said = capsys.readouterr().err
    assert said.endswith(" …\n") and said.count("\n") == 1 and "{" not in said
