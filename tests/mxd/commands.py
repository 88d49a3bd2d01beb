"""The command, run as its users run it."""

import os
import signal
import sys
from contextlib import contextmanager
from functools import partial

import pytest
import warm_process
from transformers import TrainerCallback

from mxd.cli import main as cli

SMALL = ["--experts", "64", "--k", "4", "--tokens", "8k", "--evaluation-tokens", "2048"]


def run(*arguments):
    """Run the command in a process of its own; returns exit code, stdout, stderr."""
    done = warm_process.run("-m", "mxd", *arguments, env={**os.environ, "COLUMNS": "120"})
    return done.returncode, done.stdout, done.stderr


class Interrupt(TrainerCallback):
    """Ctrl-C in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(trainer):
    """A class of trainers, whose trainings are interrupted in their second step."""
    return partial(trainer, callbacks=[Interrupt()])


@contextmanager
def killed_at_the_end(process):
    """Whatever fails inside, the process does not live on."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.kill()


def refused(monkeypatch, capsys, *arguments):
    """The command in this process: its exit code must not be 0, and its message is one line."""
    monkeypatch.setattr(sys, "argv", ["mxd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
