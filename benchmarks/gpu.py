"""Check and measure MxD on one GPU, in at most eight minutes: nothing here has run on one before.

    python benchmarks/gpu.py MODEL [--dataset TEXT] [--minutes 8] [--output benchmarks/results/gpu.json]
    python benchmarks/gpu.py --small --output FILE    # the same on a CPU, in seconds

MODEL is the folder of SmolLM2-135M, or of any other language model. Parts, each only if there is time:

    oracle       output and gradients of every layer against dense equations, in float32 and with products in bfloat16
    training     ten steps of a layer in CUDA's mode that raises an error where the host waits for the GPU
    distillation `mxd decompose`: seconds, tokens a second, peak memory, NMSE, cross-entropies; tokens a second that
                 the untouched and the spliced model generate
    speed        GPT-2 and Llama shapes of `speed.py`: milliseconds and peak bytes of a step

A part that fails is recorded with its error, and the next one runs. Exit code 1 if one failed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from contestants import Running
from report import machine
from speed import SHAPES, K, commit
from torch import Tensor

from mxd import demo
from mxd.base.base_model import load_base_model
from mxd.jobs.decompose import decompose
from mxd.jobs.decompositions import load_decomposition
from mxd.jobs.options import DecompositionOptions
from mxd.modeling_mxd import MxDLayerConfig, SparseLayer, make_layer, make_spliced
from mxd.trainers.parameter_budget import num_experts_matching_transcoder

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests"))  # the layers' oracle
FORMS: dict[str, dict[str, Any]] = {
    "mxd": {},
    "mxd, GLU": {"encoder_type": "glu", "hidden_act": "silu"},
    "transcoder": {"method": "transcoder"},
    "skip transcoder": {"method": "skip_transcoder"},
    "hierarchical": {"num_expert_groups": 16, "num_groups_per_tok": 4},
}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CONTESTANTS = ("dense PyTorch", "exact", "exact, bf16 products", "hierarchical", "transcoder", "MLP")


def oracle(options: argparse.Namespace) -> dict[str, Any]:
    """Compare every form of layer with the dense equations; the largest relative error of output and gradients."""
    from reference import reference_forward

    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    for form, changes in FORMS.items():
        for k in (1, 8, 64) if "num_expert_groups" not in changes else (8,):
            with torch.device(options.device):
                layer = make_layer(MxDLayerConfig(48, 40, 96, 256, k, **changes))
                x, weights = torch.randn(3, 50, 48), torch.randn(3, 50, 40)
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            wanted = _gradients(layer, partial(reference_forward, layer), x, weights)
            for dtype, tolerance in TOLERANCES.items():
                with torch.autocast(options.device, dtype, enabled=dtype != torch.float32):
                    made = _gradients(layer, layer, x, weights)
                pairs = zip(made, wanted, strict=True)
                errors = [float((one.double() - other.double()).norm() / other.double().norm()) for one, other in pairs]
                found[f"{form}, K = {k}, {dtype}"] = max(errors)
                if not max(errors) <= tolerance:
                    raise AssertionError(f"{form}, K = {k}, {dtype}: relative errors {errors}")
    return found


def _gradients(layer: SparseLayer, forward: Callable[[Tensor], Tensor], x: Tensor, weights: Tensor) -> list[Tensor]:
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    (y * weights.to(y.dtype)).sum().backward()
    gradients = [
        parameter.grad.clone() for name, parameter in layer.named_parameters() if not name.startswith("router")
    ]
    assert x.grad is not None
    return [y.detach(), x.grad, *gradients]


def training(options: argparse.Namespace) -> dict[str, Any]:
    """Take steps of a layer in CUDA's mode that refuses to wait."""
    if options.device != "cuda":
        return {"waits": None}
    running = Running("exact", _job("GPT-2", options) | {"mode": "train"})
    running.timed_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            output = running.model(running.x)
            (output - running.y).square().sum(-1).mean().backward()
            running.optimizer.step()
            running.optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"waits": 0}


def distillation(options: argparse.Namespace) -> dict[str, Any]:
    """Decompose one layer of the model, and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        how: dict[str, Any] = {"tokens": options.tokens}
        if options.small:
            how |= {"num_experts": 64, "batch_tokens": 256, "evaluation_tokens": 256}
        asked = DecompositionOptions(model=options.model, dataset=options.dataset, output=folder, **how)
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        results = decompose(asked)
        made = results["settings"]["training"]
        generated = generation(options, folder)
    return {
        "model": Path(options.model).name,
        "layers": made["layers"],
        "seconds": made["seconds"],
        "tokens_per_second": made["tokens_trained"] / made["seconds"],
        "peak_bytes": torch.cuda.max_memory_allocated() if options.device == "cuda" else None,
        "nmse": {layer: row["nmse"] for layer, row in results["layers"].items()},
        "cross_entropy": results["cross_entropy"],
        "generation": generated,
    }


def generation(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return greedy tokens a second of the untouched and of the spliced model, for one row and for 16."""
    model, _, _ = load_base_model(options.model)
    spliced = make_spliced(model.to(options.device), load_decomposition(folder), folder)
    new, found = 8 if options.small else 64, {}
    for rows in (1, 16):
        ids = torch.randint(3, model.config.vocab_size, (rows, 16), device=options.device)

        def seconds(ids: Tensor = ids) -> float:
            started = time.perf_counter()
            spliced.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new)
            _finish(options.device)
            return time.perf_counter() - started

        seconds()  # warm-up
        with spliced.untouched():
            found[f"untouched, {rows}"] = rows * new / min(seconds() for _ in range(3))
        found[f"spliced, {rows}"] = rows * new / min(seconds() for _ in range(3))
    return found


def speed(options: argparse.Namespace) -> dict[str, Any]:
    """Time steps of `contestants.py` one after another in this process."""
    found: dict[str, Any] = {}
    for shape in ("GPT-2",) if options.small else ("GPT-2", "Llama-3.2-3B"):
        for mode in ("train", "forward"):
            job = _job(shape, options) | {"mode": mode}
            for name in CONTESTANTS[1:3] if options.small else CONTESTANTS:
                if time.monotonic() > options.deadline:
                    return found
                running = Running(name, job)
                turns = [running.timed_step() for _ in range(2 if options.small else 20)][1:]
                found[f"{shape}, {mode}, {name}"] = {
                    key: statistics.median(turn[key] for turn in turns) for key in turns[0]
                }
                del running
    return found


def _job(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    width, units, glu, tokens = (64, 128, False, 128) if options.small else SHAPES[shape]
    tokens = tokens if options.small else 4096
    experts = num_experts_matching_transcoder(width, width, units, 32, "glu" if glu else "mlp")
    return {"I": width, "O": width, "H": units, "glu": glu, "tokens": tokens, "K": K, "device": options.device,
            "N": experts, "latents": 32 * width}  # fmt: skip


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


PARTS = {"oracle": oracle, "training": training, "distillation": distillation, "speed": speed}


def main(arguments: list[str] | None = None) -> int:
    """Run all parts, and write what they found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=demo.MODEL_NAME, help="folder of the model to distil")
    parser.add_argument("--dataset", nargs="*", default=[], help="text to distil on")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    options = parser.parse_args(arguments)
    if options.small:
        options.tokens = 512
    elif options.device == "cpu":
        parser.error("no GPU is here: use --small")
    options.deadline = time.monotonic() + 60 * options.minutes
    results: dict[str, Any] = {"machine": machine(torch.get_num_threads(), options.device), "commit": commit()}
    for name, part in PARTS.items():
        started = time.monotonic()
        if started > options.deadline:
            results[name] = {"skipped": "no time was left"}
            continue
        try:
            results[name] = part(options)
        except Exception as error:  # the other parts say more about the machine
            results[name] = {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        results[name]["part_seconds"] = time.monotonic() - started
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    return int(any("failed" in results[name] for name in PARTS))


if __name__ == "__main__":
    sys.exit(main())
