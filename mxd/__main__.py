"""`python -m mxd`."""

from .cli.main import main

main()
