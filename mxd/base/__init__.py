"""The frozen base model: loading it, and reading what its MLPs are given and give."""
