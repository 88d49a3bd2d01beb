"""Layers, or the experts of each layer, shared by two processes (gloo): equal to one process within rounding."""

import json
from pathlib import Path

import pytest
from test_two_processes import check_equal, run, weights

from mxd import DecompositionOptions, decompose, demo
from mxd.jobs.layer_passes import level_groups

OPTIONS = {"layers": [1, 4], "num_experts": 35, "num_experts_per_tok": 2, "tokens": 512, "batch_tokens": 256,
           "context_length": 64, "evaluation_tokens": 128}  # fmt: skip
TRAINING = {"calibration_tokens": 100, "statistics_tokens": 100, "disable_tqdm": True}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of decompositions of one process and of two, what these two said, and the options."""
    root = tmp_path_factory.mktemp("sharding")
    options = {**OPTIONS, "training": TRAINING, "dataset": [str(demo.text_path("train"))]}
    processes = run(2, str(Path(__file__).with_name("sharded.py")), root, json.dumps(options))
    decompose(DecompositionOptions(**options, output=str(root / "one")))
    said = [[json.loads(line) for line in process.stdout.splitlines()[-7:]] for process in processes]
    return root, said, options


@pytest.mark.parametrize(
    "case", range(4), ids=["an odd number", "fewer a process than K", "skip transcoder", "resumed"]
)
def test_experts_shared_by_two_processes_learn_as_in_one(made, case):
    """Losses, gradients' norms, weights, checkpoints with the optimizer's state; a checkpoint goes on in either way."""
    for lines in made[1]:
        name, same_files, *differences = lines[case].values()
        assert same_files and len(differences) > 1 and max(differences) < 1e-5, (name, lines[case])


def test_layers_shared_by_two_processes_are_those_of_one(made):
    one, two = made[0] / "one", made[0] / "layers"
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    check_equal(*(weights(folder.glob("*.safetensors")) for folder in (one, two)))
    first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, two))
    for layer, figures in first["layers"].items():
        assert second["layers"][layer] == pytest.approx(figures, rel=1e-3), layer
    assert made[1][0][4] == made[1][1][4] == second["layers"]


def test_every_process_says_what_it_keeps(made):
    (*_, first, second), (*_, other, same) = made[1]
    assert "layers-1: run again with --resume" in first and "layers-4: run again with --resume" in other
    assert second == same and "step 1 of 2" in second and "experts-part: run again" in second


@pytest.mark.parametrize("shard", ["layers", "experts"])
def test_one_process_goes_on_with_what_two_began(made, shard):
    part = made[0] / f"{shard}-part"
    decompose(DecompositionOptions(**made[2], shard=shard, output=str(part), resume=True))
    check_equal(*(weights(folder.glob("*.safetensors")) for folder in (made[0] / "one", part)))
    assert not list(part.glob("layers-*")) and not list(part.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("count", "groups"),
    [(1, [[0, 1, 2, 3]]), (2, [[0, 1, 2], [3]]), (3, [[0], [1, 2], [3]]), (9, [[0], [1], [2], [3]])],
)
def test_neighbours_are_dealt_so_that_the_work_is_level(count, groups):
    assert level_groups([3, 0, 2, 1], count, lambda layers: 3 * max(layers) + len(layers)) == groups
