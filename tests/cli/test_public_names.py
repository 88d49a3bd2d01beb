import ast
import sys
from pathlib import Path

import pytest

import mxd

ROOMS = ["modeling_mxd", "hub_cards", "trainers", "mxd"]


def test_every_public_name_is_there():
    assert len(mxd.__all__) == len(set(mxd.__all__)) > 20
    for name in mxd.__all__:
        assert getattr(mxd, name).__name__ == name
    with pytest.raises(AttributeError, match="nonsense"):
        mxd.nonsense  # noqa: B018


def test_the_names_that_type_checkers_know_are_those():
    tree = ast.parse(Path(mxd.__file__).read_text())
    (known,) = (node for node in tree.body if isinstance(node, ast.If))
    names = [alias.name for node in known.body for alias in node.names]
    assert sorted(names) == sorted(mxd.__all__)
    assert set(names) <= set(dir(mxd))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("room", [room for room in ROOMS if (Path(mxd.__file__).parents[1] / room).is_dir()])
def test_imports_go_one_way(room):
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    for path in (Path(mxd.__file__).parents[1] / room).rglob("*.py"):
        assert not {name.split(".")[0] for name in imported_modules(path)} & later, path


def test_what_a_hub_repo_carries_needs_torch_and_transformers_alone():
    needed = {"torch", "transformers", "safetensors", "huggingface_hub"}  # transformers itself needs the last two
    for path in (Path(mxd.__file__).parents[1] / "modeling_mxd").glob("*.py"):
        assert {name.split(".")[0] for name in imported_modules(path)} <= sys.stdlib_module_names | needed, path
