"""`python -m mxd`."""

from .cli import main

main()
