"""Training in two processes (gloo) is training in one on the same steps."""

import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from warm_process import WarmProcess

from mxd.trainers import last_complete_checkpoint

SCRIPT = str(Path(__file__).with_name("distil.py"))


def run(processes, *arguments):
    """Run the script as one process, or as several with the environment that torchrun gives them."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        {**address, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        for rank in range(processes)
    ]
    started = [WarmProcess(SCRIPT, *arguments, env={**os.environ, **(rank if processes > 1 else {})}) for rank in ranks]
    for done in [process.wait() for process in started]:
        assert done.returncode == 0, done.stderr[-3000:]


def trained(folder, kind, processes):
    run(processes, folder, kind, "plain")
    files = [*(folder / "final").glob("*.safetensors"), *folder.glob("checkpoint-10/auxiliary_transcoder.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize("kind", ["finetuning", "auxiliary"])
def test_two_processes_learn_what_one_does(tmp_path, kind):
    one = trained(tmp_path / "one", kind, 1)
    two = trained(tmp_path / "two", kind, 2)
    assert one.keys() == two.keys()
    assert (kind == "auxiliary") == ("0.decoder" in one)
    for name, value in one.items():
        tolerance = 0.03 if "expert_" in name else 1e-3  # of 176 tokens
        torch.testing.assert_close(two[name], value, rtol=1e-2, atol=tolerance, msg=name)
        assert "expert_" not in name or value.any()


def test_an_interrupt_of_one_process_ends_both_after_the_same_step(tmp_path):
    """The processes' batches differ in tokens, and calibrating on them ends for both after the same batch."""
    run(2, tmp_path, "padded", "plain", "interrupt=3")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
