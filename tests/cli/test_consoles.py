"""What the command prints in encodings that lack some of it, and the commands and code that its messages advise."""

import io
import sys

import pytest

from mxd.cli import main as cli
from mxd.cli.jobs import COMMANDS
from mxd.cli.tables import print_evaluation, print_found
from mxd.hub_cards import DecompositionInfo

LAYER = {"nmse": 0.1, "fvu": 0.1, "l0": 4.0, "dead_experts": 0.0, "expert_share": 0.9, "specialised_share": None}
LOSS = {"untouched": 2.9, "spliced": 2.91, "zero_ablated": 3.05, "recovered": 0.9, "rise_interval": [0.009, 0.011]}
EVALUATION = {"layers": {"4": LAYER}, "cross_entropy": LOSS, "kl": 0.0123, "top1_agreement": 0.955}
ENCODINGS = ["cp1252", "ascii", "latin-1", "cp437", "shift_jis", "utf-8"]


def printed(monkeypatch, encoding, errors, *arguments):
    """Run the command with streams as Python opens them; returns exit code and what both streams got."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors, write_through=True) for _ in range(2)]
    monkeypatch.setattr(sys, "argv", ["mxd", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    monkeypatch.undo()
    return stop.value.code or 0, *(stream.buffer.getvalue().decode(encoding, "replace") for stream in streams)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("arguments", [["--help"], ["layers"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_every_help_is_printed(monkeypatch, encoding, errors, arguments):
    code, out, err = printed(monkeypatch, encoding, errors, *arguments)
    assert code == 0 and len(out) > 200 and err.count("\n") == (arguments == ["layers"])  # what it waits for


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["nosuch/modèle", "数据", "‘quoted’", "\udce9"])
def test_a_message_is_printed_with_what_was_typed(monkeypatch, encoding, name):
    code, _, err = printed(monkeypatch, encoding, "strict", "evaluate", name)
    assert code == 1 and "error: " in err and "Traceback" not in err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_results_and_names_of_strangers_are_printed(monkeypatch, encoding):
    def app(**_):
        print_evaluation(EVALUATION)
        print_found([DecompositionInfo("user/é国", "→", [1], "mxd", 8, 2, None, 0, None)])
        raise SystemExit

    monkeypatch.setattr(cli, "app", app)
    code, out, _ = printed(monkeypatch, encoding, "strict")
    assert code == 0 and "rise of cross-entropy" in out and "user/" in out
