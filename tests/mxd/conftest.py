import json
import os
import shutil

import pytest
from commands import SMALL, run
from filelock import FileLock


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A small `mxd decompose` of the embedded default: folder, output, errors; pytest-xdist's workers share the run."""
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "finished"
    with FileLock(f"{shared}.lock"):
        if not (shared / "printed.json").exists():
            code, output, error = run("decompose", *SMALL, "--output", shared / "decomposition")
            assert code == 0, error
            (shared / "printed.json").write_text(json.dumps([output, error]))
    folder = shutil.copytree(shared / "decomposition", tmp_path_factory.mktemp("cli") / "decomposition")
    return folder, *json.loads((shared / "printed.json").read_text())
