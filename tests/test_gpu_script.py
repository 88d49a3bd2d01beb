"""The script for a GPU works on a CPU, in small."""

import json
import shutil
import sys
from pathlib import Path

from mxd.evaluation import load_evaluation

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))


def test_all_parts_run(monkeypatch, finished, tmp_path):
    import gpu

    def decompose(options):  # as the command of other tests did
        shutil.copytree(finished[0], options.output, dirs_exist_ok=True)
        return load_evaluation(options.output)

    monkeypatch.setattr(gpu, "decompose", decompose)
    code = gpu.main(["--small", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert code == 0, {name: part.get("traceback") for name, part in results.items() if isinstance(part, dict)}
    assert max(error for name, error in results["oracle"].items() if "float32" in name) < 1e-4
    assert set(results["distillation"]["generation"]) == {
        f"{kind}, {rows}" for kind in ("untouched", "spliced") for rows in (1, 16)
    }
    assert results["speed"]["GPT-2, train, exact"]["seconds"] > 0


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(monkeypatch, tmp_path):
    import gpu

    def fails(options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(gpu, "PARTS", {"oracle": fails, "training": gpu.training})
    code = gpu.main(["--small", "--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert (
        code == 1 and results["oracle"]["failed"] == "RuntimeError: no kernel" and results["training"]["waits"] is None
    )
