"""MxD: the public names of all rooms. Each is imported at its first use, so that the command's help needs no torch."""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("mxd")
