import pytest
from commands import decomposed


@pytest.fixture(scope="session")
def finished():
    """A small decomposition, made by the command: folder, stdout, stderr."""
    return decomposed()
