"""The command, run in this process as its users run it."""

import atexit
import functools
import io
import os
import shutil
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
from transformers import TrainerCallback

from mxd.cli import main as cli

# Three steps.
SMALL = ["--num-experts", "64", "-k", "4", "--tokens", "3500", "--batch-tokens", "1024", "--evaluation-tokens", "1024"]


def run(*arguments):
    """Run the command; returns exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, redirect_stdout(out), redirect_stderr(err):
        patched.setattr(sys, "argv", ["mxd", *map(str, arguments)])
        patched.setenv("COLUMNS", "120")
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
    return code, out.getvalue(), err.getvalue()


@functools.cache
def decomposed():
    """The main job on the embedded model and text, made small: folder, stdout, stderr."""
    parent = tempfile.mkdtemp(prefix="mxd-tests-")
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = Path(parent, "decomposition")
    code, output, error = run("decompose", *SMALL, "--output", folder)
    assert code == 0, error
    return folder, output, error


class Interrupt(TrainerCallback):
    """Ctrl-C in the second step, or an exception in the third."""

    def __init__(self, error=None):
        self.error = error

    def on_step_begin(self, args, state, control, **kwargs):
        if self.error is None and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        if self.error is not None and state.global_step == 2:
            raise self.error


def interrupted(trainer, error=None):
    """A class of trainers, whose trainings are interrupted in their second step, or fail after it."""
    return partial(trainer, callbacks=[Interrupt(error)])


def refused(monkeypatch, capsys, *arguments):
    """Run the command: its exit code must not be 0. Returns its message."""
    monkeypatch.setattr(sys, "argv", ["mxd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
