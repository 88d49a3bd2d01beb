"""Measure what a shared decomposition costs: size of the repo, time and peak memory of loading beside the base model
alone, and the transfer for one layer of a decomposition of all layers.

    python benchmarks/sharing.py MODEL

MODEL is a folder with a language model. Layers are untrained, K = 32, as many parameters as a transcoder with 32
latents per dimension. Loads run in processes of their own, alternating; results are medians of `--repeats`. A Hub on
loopback counts the bytes that a reader with an empty cache receives. Writes benchmarks/results/sharing.json.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sharing.json"
REPO = "user/all-layers"


def load(what: str, folder: str) -> None:
    """Load a model in this process and print seconds and peak memory."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder)
    seconds = time.perf_counter() - started
    model(torch.arange(8)[None])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"what": what, "seconds": seconds, "peak_bytes": peak}))  # noqa: T201


def save(model: str, layers: list[int] | None, experts: int | None, folder: Path) -> dict[str, Any]:
    """Save an untrained decomposition of some layers (None: all), and return its sizes."""
    from mxd.base.base_model import load_base_model
    from mxd.base.pretrained_weights import record_base
    from mxd.jobs.decompose import layer_config
    from mxd.jobs.options import DecompositionOptions
    from mxd.modeling_mxd import MxDConfig, MxDModel, find_mlps

    base, _, _ = load_base_model(model)
    sites = find_mlps(base)
    options = DecompositionOptions(num_experts=experts)
    configs = {layer: layer_config(sites[layer], options) for layer in (sites if layers is None else layers)}
    decomposition = MxDModel(MxDConfig.from_layer_configs(configs, base_model_name_or_path=str(Path(model).resolve())))
    record_base(decomposition, base)
    decomposition.save_pretrained(folder)
    weights = sorted(folder.glob("*.safetensors"))
    return {
        "layers": len(configs),
        "parameters": decomposition.num_parameters(),
        "base_parameters": base.num_parameters(),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "other_bytes": sum(path.stat().st_size for path in folder.iterdir() if path not in weights),
        "shards": len(weights),
        "largest_shard_bytes": max(path.stat().st_size for path in weights),
    }


DOWNLOAD = """
from transformers import AutoModel
print(len(AutoModel.from_pretrained({repo!r}, layers={layers!r}, trust_remote_code=True).layers))
"""


def transferred(hub: Any, layers: list[int] | None) -> dict[str, int]:
    """Count what the Hub sends to a reader who loads some layers (None: all) into an empty cache, without mxd."""
    hub.requests.clear()
    with tempfile.TemporaryDirectory() as home:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_XET": "1"}
        command = [sys.executable, "-c", DOWNLOAD.format(repo=REPO, layers=layers)]
        done = subprocess.run(command, check=True, cwd=home, env=environment, capture_output=True, text=True)
    got = [(path, size) for method, path, size in hub.requests if method == "GET"]
    return {
        "layers": int(done.stdout.split()[-1]),
        "bytes": sum(size for _, size in got),
        "files of weights": sum(path.endswith(".safetensors") for path, _ in got),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(*options.load)
        return
    sys.path.append(str(HERE.parent / "tests" / "hub_cards"))
    from loopback_hub import HubServer

    with tempfile.TemporaryDirectory() as temporary:
        three, whole = Path(temporary) / "three", Path(temporary) / "all"
        results: dict[str, Any] = {"three_layers": save(options.model, [8, 15, 22], None, three)}
        runs: dict[str, list[dict[str, Any]]] = {"base": [], "spliced": []}
        for _ in range(options.repeats):
            for what, folder in (("base", options.model), ("spliced", str(three))):
                command = [sys.executable, __file__, options.model, "--load", what, folder]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs[what].append(json.loads(done.stdout.splitlines()[-1]))
        for what, measured in runs.items():
            results[what] = {
                name: statistics.median(run[name] for run in measured) for name in ("seconds", "peak_bytes")
            }
        # Few experts, since only the proportion counts here.
        results["all_layers"] = save(options.model, None, 256, whole)
        with HubServer() as hub:
            hub.create(REPO, {path.name: path.read_bytes() for path in whole.iterdir()})
            results["transferred_for_all"] = transferred(hub, None)
            results["transferred_for_one"] = transferred(hub, [8])
        results["transferred_share"] = results["transferred_for_one"]["bytes"] / results["transferred_for_all"]["bytes"]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
