"""Training in two processes (torchrun, gloo) is training in one on the same steps."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mxd.trainers import last_complete_checkpoint

SCRIPT = str(Path(__file__).with_name("distil.py"))


TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def trained(folder, kind, *launcher):
    run(*launcher, SCRIPT, str(folder), kind, "plain")
    files = [*(folder / "final").glob("*.safetensors"), *folder.glob("checkpoint-10/auxiliary_transcoder.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("kind", ["finetuning", "auxiliary"])
def test_two_processes_learn_what_one_does(tmp_path, kind):
    one = trained(tmp_path / "one", kind, sys.executable)
    two = trained(tmp_path / "two", kind, *TWO)
    assert one.keys() == two.keys()
    assert (kind == "auxiliary") == ("0.decoder" in one)
    for name, value in one.items():
        if "expert_" not in name:  # measured by each process on its own rows, as the activations' scales are
            torch.testing.assert_close(two[name], value, rtol=1e-2, atol=1e-3, msg=name)


def test_an_interrupt_of_one_process_ends_both_after_the_same_step(tmp_path):
    run(*TWO, SCRIPT, str(tmp_path), "rows", "plain", "interrupt=3")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
