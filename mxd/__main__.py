"""Run the command: `python -m mxd` is the same as `mxd`."""

from .cli.main import main

main()
