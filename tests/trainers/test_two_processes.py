"""Training in two processes (gloo) is training in one on the same steps, in Python and by the commands."""

import json
import os
import socket
from pathlib import Path

import distil
import pytest
import transformers
from commands import run as run_here
from packaging.version import Version
from safetensors.torch import load_file
from warm_process import WarmProcess

from mxd import demo
from mxd.trainers import last_complete_checkpoint

# Earlier ones cannot read an optimizer's state in several processes on CPUs.
RESUMES = Version(transformers.__version__) >= Version("5.18")
SCRIPT = str(Path(__file__).with_name("distil.py"))


def run(processes, *arguments):
    """Run Python as one process, or as several with the environment that torchrun gives them; return them, finished."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        for rank in range(processes)
    ]
    started = [WarmProcess(*arguments, env={**os.environ, **(rank if processes > 1 else {})}) for rank in ranks]
    ended = [process.wait() for process in started]
    for done in ended:
        assert done.returncode == 0, done.stderr[-3000:]
    return ended


def weights(files):
    return {(file.name, name): value for file in files for name, value in load_file(file).items()}


def check_equal(one, two):
    """The norm of the difference of every tensor is below 1e-5 of the tensor's."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert (two[name] - value).double().norm() <= 1e-5 * value.double().norm(), name
        assert value.any() or "bias" in name[1]


def trained(folder):
    return weights([*(folder / "final").glob("*.safetensors"), *folder.glob("checkpoint-8/auxiliary*.safetensors")])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Trainings of two processes: their folders, and the steps at which each of the processes ended each training."""
    root = tmp_path_factory.mktemp("together")
    kinds = {"finetuning": [], "routed": [], "padded": [], "part": ["interrupt=2"], "resumed": ["resume"]}
    asked = []
    for name, options in list(kinds.items())[: None if RESUMES else -1]:
        folder, kind = (root / "part", "padded") if name in ("part", "resumed") else (root / name, name)
        asked += ["--", folder, kind, "plain", *options]
    return root, [json.loads(process.stdout.splitlines()[-1]) for process in run(2, SCRIPT, *asked[1:])]


@pytest.mark.parametrize("kind", ["finetuning", "routed"])
def test_two_processes_learn_what_one_does(together, tmp_path, kind):
    distil.main(str(tmp_path), kind, "plain")
    one = trained(tmp_path)
    check_equal(one, trained(together[0] / kind))
    assert any("0.decoder" in name for name in one) == (kind != "finetuning")
    assert any("router" in name for _, name in one) == (kind == "routed")


@pytest.mark.skipif(not RESUMES, reason="fixed in transformers 5.18")
def test_an_interrupt_of_one_process_ends_both_after_the_same_step_and_they_read_on(together):
    """The processes' batches differ in tokens."""
    root, steps = together
    assert steps == [[8, 8, 8, 2, 8]] * 2
    assert (root / "part" / "checkpoint-2" / "training_rows.pt").is_file()
    assert last_complete_checkpoint(root / "part").endswith("checkpoint-8")
    for file in (root / "padded" / "final").glob("*.safetensors"):
        assert (root / "part" / "final" / file.name).read_bytes() == file.read_bytes()


OPTIONS = {"layers": [1, 2], "num_experts": 16, "num_experts_per_tok": 2, "num_groups_per_tok": 2, "tokens": 2048,
           "batch_tokens": 256, "context_length": 64, "evaluation_tokens": 256}  # fmt: skip
TRAINING = {"gradient_accumulation_steps": 2, "calibration_tokens": 300, "statistics_tokens": 300, "max_steps": 2}
IN_PYTHON = """
import json, os, runpy, sys
made, tuned, *command = sys.argv[1:]
sys.argv = ["mxd", *command, made]
try:
    runpy.run_module("mxd", run_name="__main__", alter_sys=True)
except SystemExit as ended:
    assert not ended.code
from mxd import FinetuningOptions, finetune
from mxd.base.processes import OtherProcessError, in_first_process
options = FinetuningOptions(decomposition=made, output=tuned, tokens=256, batch_tokens=128,
    context_length=64, evaluation_tokens=128, training={"disable_tqdm": True, "statistics_tokens": 300})
results = finetune(options)
for error in (ValueError("bad"), OSError(28, "full")):
    def fail():
        raise error
    try:
        in_first_process(fail)
    except Exception as raised:
        results[type(error).__name__] = [isinstance(raised, ValueError), "bad" in str(raised), "full" in str(raised)]
with open(f"{tuned}-{os.environ['RANK']}.json", "w") as file:
    json.dump(results, file, sort_keys=True)
try:
    in_first_process(sys.exit)  # as by a signal
except OtherProcessError as error:
    assert "another process has ended" in str(error)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A decomposition of one process and, by the command, of two, which fine-tune it then; and what these print."""
    root = tmp_path_factory.mktemp("processes")
    texts = {"dataset": [str(demo.text_path("train"))], "heldout_dataset": [str(demo.text_path("heldout"))]}
    (root / "options.yaml").write_text(json.dumps({**OPTIONS, **texts, "training": TRAINING}))
    command = ["decompose", "--config", root / "options.yaml", "--output"]
    code, _, error = run_here(*command, root / "one")
    assert code == 0, error
    return root / "one", root / "two", run(2, "-c", IN_PYTHON, root / "two", root / "tuned", *command)


def test_the_command_in_two_processes_makes_what_it_makes_in_one(folders):
    one, two, _ = folders
    names = [sorted(path.relative_to(folder) for path in folder.rglob("*")) for folder in (one, two)]
    assert names[0] == names[1]
    check_equal(*(weights(folder.glob("*.safetensors")) for folder in (one, two)))
    first, second = (json.loads((folder / "evaluation.json").read_text()) for folder in (one, two))
    for name in ("batch_tokens", "tokens_trained", "documents", "sketch", "learning_rate"):
        assert first["settings"]["training"][name] == second["settings"]["training"][name], name
    assert first["settings"]["training"]["batch_tokens"] == 2 * 256
    for layer, figures in first["layers"].items():
        assert second["layers"][layer] == pytest.approx(figures, rel=1e-3), layer


def test_the_first_process_alone_prints(folders):
    (_, two, (first, second)) = folders
    assert first.stdout.count("NMSE") == 1 and first.stdout.count(f"Saved in {two}") == 1
    assert "distil" in first.stderr and second.stdout == second.stderr == ""


def test_in_python_every_process_returns_the_same_and_raises_the_first_ones_errors(folders):
    tuned = folders[1].with_name("tuned")
    first, second = (Path(f"{tuned}-{rank}.json").read_text() for rank in range(2))
    assert first == second
    results = json.loads(first)
    assert (results["ValueError"], results["OSError"]) == ([True, True, False], [False, False, True])
    assert results["settings"]["finetuning"][-1]["before"]["layers"].keys() == {"1", "2"}
    assert not (tuned / "run_start.json").exists()
