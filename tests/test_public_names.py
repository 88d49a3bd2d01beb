import ast
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import warm_process

import mxd
from mxd import demo
from mxd.modeling_mxd.configuration_mxd import DEMO_MODEL

ROOMS = ["modeling_mxd", "base", "data", "evaluation", "experts", "hub_cards", "trainers", "explorer", "jobs", "cli"]


def test_every_public_name_is_there():
    assert len(mxd.__all__) == len(set(mxd.__all__)) > 20
    for name in mxd.__all__:
        assert getattr(mxd, name).__name__ == name
    assert set(mxd.__all__) <= set(dir(mxd))
    assert mxd.__version__ == version("mxd")
    with pytest.raises(AttributeError, match="nonsense"):
        mxd.nonsense  # noqa: B018


def test_the_embedded_model_has_one_name():
    assert demo.MODEL_NAME == DEMO_MODEL


def test_folders_of_a_project_hide_no_module_of_ours(tmp_path):
    for name in ("trainers", "evaluate", "hub_cards", "modeling_mxd", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('another module')")
    code = "import sys; sys.path.insert(0, ''); from mxd import decompose, push_decomposition; print(decompose)"
    done = warm_process.run("-c", code, cwd=tmp_path)
    assert done.stdout.startswith("<function decompose"), done.stderr


def test_commands_that_train_nothing_do_not_load_the_trainers():
    """They load transformers' Trainer, and with it PEFT and what that finds, which takes seconds."""
    jobs = ", ".join(
        f"mxd.jobs.{name}" for name in ("steer", "experts", "inspect_text", "explore", "evaluate", "layers")
    )
    done = warm_process.run("-c", f"import sys, {jobs}; sys.exit('mxd.trainers' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_only_what_plots_loads_matplotlib():
    for room in ROOMS:
        for path in folder_of(room).rglob("*.py"):
            statements = ast.parse(path.read_text()).body
            first = [node for node in statements if isinstance(node, ast.Import | ast.ImportFrom)]
            assert "matplotlib" not in "".join(map(ast.unparse, first)), path


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def folder_of(room):
    return Path(find_spec(f"mxd.{room}").submodule_search_locations[0])


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    later = {f"mxd.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
    for path in folder_of(room).rglob("*.py"):
        rooms = {".".join(name.split(".")[:2]) for name in imported_modules(path)}
        assert not rooms & later, path
        assert room != "data" or rooms & {"mxd", "mxd.modeling_mxd", "mxd.base"} <= {"mxd"}, path


def test_what_a_hub_repo_carries_needs_torch_and_transformers_alone():
    needed = {"torch", "transformers", "safetensors", "huggingface_hub"}  # transformers itself needs the last two
    for path in folder_of("modeling_mxd").glob("*.py"):
        assert {name.split(".")[0] for name in imported_modules(path)} <= sys.stdlib_module_names | needed, path
