"""The frozen base model: load it, and read the inputs and outputs of its MLPs."""
