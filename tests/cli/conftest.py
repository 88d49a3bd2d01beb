import pytest
from commands import SMALL, run


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The main job on the embedded default, made small."""
    folder = tmp_path_factory.mktemp("cli") / "decomposition"
    code, output, error = run("decompose", *SMALL, "--output", folder)
    assert code == 0, error
    return folder, output, error
