"""The command `mxd`: decompose a model, evaluate a decomposition, share it and find others'."""

import logging
import os
import sys
from pathlib import Path

import typer

from . import measuring as cli_measuring
from . import sharing as cli_sharing
from . import training as cli_training
from .options import OUTPUTS
from .tables import visible

INTERRUPTED = 130
MAX_MESSAGE = 2000

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # the default one takes "[the account's default]" for markup and leaves it out
    help="Mixtures of Decoders: take the MLPs of a language model apart without breaking the model.",
    epilog="With --debug, anywhere, an error shows its traceback.",
)
for command in (
    cli_training.decompose,
    cli_measuring.evaluate,
    cli_measuring.experts,
    cli_measuring.use,
    cli_measuring.probe,
    cli_training.frontier,
    cli_training.finetune,
    cli_sharing.push,
    cli_sharing.search,
    cli_sharing.show,
    cli_measuring.layers,
):
    app.command()(command)


def main() -> None:
    """Run the command: what a user can put right is one message and exit code 1, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if debug := "--debug" in sys.argv:
        sys.argv.remove("--debug")
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
            kept, how = _kept(sys.argv[1:])
            _fail(f"interrupted; {kept}: {how}" if kept else "interrupted", INTERRUPTED)
        raise
    except Exception as error:
        if debug:
            raise
        kept, how = _kept(sys.argv[1:])
        code = INTERRUPTED if type(error).__name__ == "Interrupted" else 1
        _fail(_explain(error, f"; {kept}: put it right, then {how}" if kept else ""), code)


def _kept(arguments: list[str]) -> tuple[str, str]:
    """What is left of a command that was ended or could not write, and how it goes on; empty where nothing is."""
    command, output = arguments[0] if arguments else "", ""
    if command == "frontier":
        return "what is finished is kept", "run the same command to go on"
    for argument, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.partition("=")[0] == "--output":
            output = argument.partition("=")[2] or value
    folder = Path(output or OUTPUTS.get(command, ""))
    if command not in OUTPUTS or not any(folder.glob("checkpoint-*/trainer_state.json")):  # which is written last
        return "", ""
    return "checkpoints that were complete are kept", "run again with --resume"


def _explain(error: Exception, kept: str = "") -> str:
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return f"{os.strerror(error.errno)}{where}{kept}"
    name = type(error).__name__
    # torch.save says of a full disk only that its position in the file is not the expected one, safetensors' own error
    # is of reading too.
    if any(sign in str(error) for sign in ("No space left", "inline_container", "Error while serializing")):
        return f"a file could not be written, the disk may be full ({error}){kept}"
    if name == "SafetensorError":
        return f"a file of weights cannot be read, it is broken or was not written to its end ({error})"
    if isinstance(error, ValueError | OSError) or name == "Interrupted":
        return str(error)
    return f"{name}: {error} (run with --debug for the traceback)"


def _fail(message: str, code: int) -> None:
    typer.secho(f"error: {visible(message)[:MAX_MESSAGE]}", fg=typer.colors.RED, err=True)
    sys.exit(code)
