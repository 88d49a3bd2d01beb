"""The command `mxd`: decompose a model, evaluate a decomposition, share it and find others'."""

import io
import logging
import os
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer

from mxd.base.processes import launched
from mxd.jobs.options import INTERRUPTED, TERMINATED, resumable

from .commands import make_command
from .jobs import COMMANDS
from .tables import visible

TRAINING_ENDS = ("Interrupted", "TrainingFailed")  # exceptions of mxd.jobs.run_folder, which imports torch
MAX_MESSAGE = 2000
OTHERS_WAIT = 10  # seconds

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # the default mode takes "[the account's default]" for markup and drops it
    help="Mixtures of Decoders: replace MLPs of a language model by sparse experts without breaking the model.",
    epilog="With --debug, anywhere, an error shows its traceback.",
)
for _name, _command in COMMANDS.items():
    app.command(_name)(make_command(_command.options, _command.run))


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mxd {version('mxd')}")
        raise typer.Exit


@app.callback(help=app.info.help)
def about(
    show: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Take the options that stand before the command."""


def main() -> None:
    """Run the command. What a user can put right is one message and exit code 1, never a traceback."""
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal's encoding lacks becomes a question mark
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    rank, _ = launched()
    logging.basicConfig(level=logging.ERROR if rank else logging.WARNING, format="%(levelname)s: %(message)s")
    if debug := "--debug" in sys.argv:
        sys.argv.remove("--debug")
    try:
        app(standalone_mode=rank == 0)
    except SystemExit as ended:
        if ended.code in (INTERRUPTED, TERMINATED) and rank == 0:  # the first is typer's for a KeyboardInterrupt
            kept, how = _kept(sys.argv[1:])
            what = "interrupted" if ended.code == INTERRUPTED else "terminated"
            _fail(f"{what}; {kept}: {how}" if kept else what, ended.code)
        raise
    except Exception as error:
        if debug:
            raise
        if rank and _said_by_the_first(error):
            time.sleep(OTHERS_WAIT)  # the launcher ends all processes as soon as one has failed
            sys.exit(_exit_code(error))
        # An end of the training says by itself what is kept.
        kept, how = ("", "") if type(error).__name__ in TRAINING_ENDS else _kept(sys.argv[1:])
        of_process = f"process {rank}: " if rank else ""
        _fail(of_process + _explain(error, f"; {kept}: put it right, then {how}" if kept else ""), _exit_code(error))


def _said_by_the_first(error: Exception) -> bool:
    """Return whether an error is of the user's input or of the run, which the first process reports, too."""
    names = {one.__name__ for one in type(error).mro()}
    said = bool(names & {"ValueError", "FirstProcessError", "ClickException", "Abort", *TRAINING_ENDS})
    return said and not getattr(error, "of_one_process", False)


def _exit_code(error: Exception) -> int:
    return INTERRUPTED if type(error).__name__ == "Abort" else int(getattr(error, "exit_code", 1))


def _kept(arguments: list[str]) -> tuple[str, str]:
    """Return what an interrupted or failed command left, and how to continue it; empty strings if nothing."""
    command = arguments[0] if arguments else ""
    if command == "frontier":
        return "what is finished is kept", "run the same command to go on"
    known = {one.name: one.default for one in fields(COMMANDS[command].options)} if command in COMMANDS else {}
    words = [word for argument in arguments for word in argument.split("=", 1)]
    outputs = [value for word, value in pairwise(words) if word == "--output"]
    folder = Path(outputs[-1] if outputs else str(known.get("output")))
    if "resume" not in known or not resumable(folder):
        return "", ""
    return "checkpoints that were complete are kept", "run again with --resume"


def _explain(error: Exception, kept: str = "") -> str:
    """Return an error as one message."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}{kept}"
    name = type(error).__name__
    # What torch.save and safetensors raise on a full disk does not say so.
    if any(sign in str(error) for sign in ("No space left", "inline_container", "Error while serializing")):
        return f"a file could not be written, the disk may be full ({error}){kept}"
    if name == "SafetensorError":
        return f"a file of weights cannot be read ({error})"
    if isinstance(error, ValueError) or name in TRAINING_ENDS:
        return str(error)
    if isinstance(error, OSError):
        return f"{error}{kept}"
    return f"{name}: {error}{kept} (run with --debug for the traceback)"


def _fail(message: str, code: int) -> None:
    typer.secho(f"error: {visible(message)[:MAX_MESSAGE]}", fg=typer.colors.RED, err=True)
    sys.exit(code)
