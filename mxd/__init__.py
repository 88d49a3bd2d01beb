"""MxD: take the MLPs of a language model apart without breaking the model.

The public names of all rooms in one place; `python -m mxd` and the command `mxd` are the same.
"""
