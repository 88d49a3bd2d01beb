"""The contestants of `benchmarks/speed.py`, and the process that times one of them.

    python benchmarks/contestants.py CONTESTANT JOB

JOB is a JSON object with the sizes I, O, H, N, latents, K, tokens, and glu, mode ("train" or "forward"), device,
threads. The process builds the contestant, warms up, and then answers every line on its standard input with a line of
JSON: one step, timed; and the end of it with one more.

A training step is forward, backward of the squared error, and a step of AdamW; weights are float32. A router trains
along on one token in 16, as in our trainers. In training, ours keep the memory that a step frees unless the name says
"memory given back"; the plain code gives it back unless the name says "memory kept". In a forward all give it back
unless the name says "memory kept".
"""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from mxd.base.allocation import freed_memory_kept

Job = dict[str, Any]
GROUPS_OPENED = 8


class DenseMxD(nn.Module):
    """An MxD in plain dense PyTorch, as in its authors' code."""

    def __init__(self, job: Job):
        super().__init__()
        self.k, inputs, outputs, units = job["K"], job["I"], job["O"], job["H"]
        self.gate = nn.Linear(inputs, job["N"])
        self.encoder = nn.Linear(inputs, units)
        self.encoder_up = nn.Linear(inputs, units) if job["glu"] else None
        self.decoder = nn.Linear(units, outputs, bias=False)
        self.modulation = nn.Linear(job["N"], outputs, bias=False)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) → (T, O)."""
        a = torch.relu(self.gate(x))
        kept = a.topk(self.k, dim=-1)
        a = torch.zeros_like(a).scatter_(-1, kept.indices, kept.values)
        z = F.gelu(self.encoder(x)) if self.encoder_up is None else F.silu(self.encoder(x)) * self.encoder_up(x)
        return self.modulation(a) * self.decoder(z) + self.bias


class MLP(nn.Module):
    """The untouched MLP."""

    def __init__(self, job: Job):
        super().__init__()
        self.encoder = nn.Linear(job["I"], job["H"])
        self.encoder_up = nn.Linear(job["I"], job["H"]) if job["glu"] else None
        self.decoder = nn.Linear(job["H"], job["O"])

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) → (T, O)."""
        z = F.gelu(self.encoder(x)) if self.encoder_up is None else F.silu(self.encoder(x)) * self.encoder_up(x)
        return self.decoder(z)


class Products(nn.Module):
    """The limit: only the dense products, of the gate once, of encoder and decoder once (forward) or three times
    (training). The gate's product is the faster of `F.linear` of all tokens and the layer's own chunks. Training also
    times the fused optimiser's step over all parameters, and each use of the chosen rows: Cᵀa and the gradients of a
    and x read K rows a token; the gradients of both weights are sums over each expert's tokens."""

    def __init__(self, job: Job, dtype: torch.dtype):
        super().__init__()
        from mxd.modeling_mxd.functional import chunks, product

        self.k, tokens = job["K"], job["tokens"]
        self.dtype, self.times = dtype, 3 if job["mode"] == "train" else 1
        self.gate = torch.randn(job["N"], job["I"], dtype=dtype)
        self.encoders = [torch.randn(job["H"], job["I"], dtype=dtype) for _ in range(1 + job["glu"])]
        self.decoder = torch.randn(job["O"], job["H"], dtype=dtype)
        self._chunks, self._product = chunks, product
        self.optimizer: torch.optim.Optimizer | None = None
        if job["mode"] == "train":
            modulation = torch.randn(job["N"], job["O"])
            matrices = (self.gate, modulation, *self.encoders, self.decoder)
            trained = [nn.Parameter(matrix.float()) for matrix in matrices]
            for parameter in trained:
                parameter.grad = torch.randn_like(parameter)
            self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
            self.modulation = modulation
            self.gate_in_float32 = self.gate.float()
            self.chosen = torch.randint(job["N"], (tokens, self.k))
            self.coefficients = torch.rand(tokens, self.k)
            counts = torch.bincount(self.chosen.flatten(), minlength=job["N"])
            self.offsets = counts.cumsum(0) - counts
            self.tokens_of_experts = self.chosen.flatten().argsort() // self.k
            self.gradient = torch.randn(tokens, job["O"])
        self.seconds: dict[str, float] = {}

    def step(self, x: Tensor) -> None:
        """Time the parts of a step."""
        x = x.to(self.dtype)
        clock = time.perf_counter()
        F.linear(x, self.gate)
        clock = self._note("gate at once", clock)
        for part in self._chunks(len(x), len(self.gate)):
            self._product(x[part], self.gate, None)
        clock = self._note("gate in chunks", clock)
        for _ in range(self.times):
            z = [F.linear(x, encoder) for encoder in self.encoders][-1]
            F.linear(z, self.decoder)
        clock = self._note("encoder and decoder", clock)
        if self.optimizer is not None:
            self.optimizer.step()
            clock = self._note("optimiser", clock)
            self._rows(x.float())
            self._note("chosen rows", clock)

    def _rows(self, x: Tensor) -> None:
        for table in (self.modulation, self.modulation, self.gate_in_float32):
            F.embedding_bag(self.chosen, table, mode="sum", per_sample_weights=self.coefficients)
        weights = self.coefficients.flatten()
        for rows in (x, self.gradient):
            F.embedding_bag(self.tokens_of_experts, rows, self.offsets, mode="sum", per_sample_weights=weights)

    def _note(self, name: str, since: float) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = now - since
        return now

    @property
    def limit(self) -> float:
        """Return the seconds of the last step's products."""
        return min(self.seconds["gate at once"], self.seconds["gate in chunks"]) + self.seconds["encoder and decoder"]


def ours(job: Job, **changes: Any) -> nn.Module:
    """Return one of our layers, without zeros in its weights."""
    from mxd.modeling_mxd import MxDLayerConfig, make_layer

    experts = job["N"] if changes.get("method", "mxd") == "mxd" else job["latents"]
    layer = make_layer(
        MxDLayerConfig(
            job["I"],
            job["O"],
            job["H"],
            experts,
            job["K"],
            hidden_act="silu" if job["glu"] else "gelu",
            encoder_type="glu" if job["glu"] else "mlp",
            **changes,
        )
    )
    table = layer.decoder.weight if changes.get("method", "mxd") == "mxd" else layer.decoder
    nn.init.normal_(table, std=0.02)
    return layer


def hierarchical(job: Job) -> nn.Module:
    """Return a layer with about √N groups, of which a token opens 8."""
    from mxd.trainers.router import default_num_expert_groups

    groups = default_num_expert_groups(job["N"])
    return ours(job, num_expert_groups=groups, num_groups_per_tok=min(GROUPS_OPENED, groups))


class GateAlone(nn.Module):
    """The gate of one of our layers, without the rest."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) → coefficients (T, K)."""
        return self.layer.encode(x).values


class Sparsify(nn.Module):
    """sparsify's skip transcoder (pip install eai-sparsify)."""

    def __init__(self, job: Job):
        super().__init__()
        from sparsify import SparseCoder, SparseCoderConfig

        config = SparseCoderConfig(num_latents=job["latents"], k=job["K"], transcode=True, skip_connection=True)
        self.coder = SparseCoder(job["I"], config)
        nn.init.normal_(self.coder.W_dec, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) → (T, O)."""
        return self.coder(x, x).sae_out


class SAELens(nn.Module):
    """SAELens's TopK autoencoder for training (pip install sae-lens)."""

    def __init__(self, job: Job):
        super().__init__()
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

        self.coder = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=job["I"], d_sae=job["latents"], k=job["K"]))

    def forward(self, x: Tensor) -> Tensor:
        """(T, I) → (T, I)."""
        return self.coder.decode(self.coder.encode_with_hidden_pre(x)[0])


# name: builder, and whether products are in bfloat16
CONTESTANTS: dict[str, tuple[Callable[[Job], nn.Module], bool]] = {
    "dense PyTorch": (DenseMxD, False),
    "dense PyTorch, memory kept": (DenseMxD, False),
    "exact": (ours, False),
    "exact, memory given back": (ours, False),
    "exact, bf16 products": (ours, True),
    "hierarchical": (hierarchical, False),
    "exact, memory kept": (ours, False),
    "hierarchical, bf16 products": (hierarchical, True),
    "exact, gate alone": (lambda job: GateAlone(ours(job)), False),
    "hierarchical, gate alone": (lambda job: GateAlone(hierarchical(job)), False),
    "transcoder": (lambda job: ours(job, method="transcoder"), False),
    "transcoder, bf16 products": (lambda job: ours(job, method="transcoder"), True),
    "sparsify skip transcoder": (Sparsify, False),
    "sparsify skip transcoder, fused AdamW, memory kept": (Sparsify, False),
    "SAELens TopK SAE": (SAELens, False),
    "MLP": (MLP, False),
    "bare products": (lambda job: Products(job, torch.float32), False),
    "bare products, bf16": (lambda job: Products(job, torch.bfloat16), True),
}
BESIDE = ("sparsify skip transcoder", "sparsify skip transcoder, fused AdamW, memory kept", "SAELens TopK SAE")
PLAIN = ("dense PyTorch", "dense PyTorch, memory kept", *BESIDE)
OF_ONE_MODE = {
    "exact, memory given back": "train",
    "exact, memory kept": "forward",
    "sparsify skip transcoder, fused AdamW, memory kept": "train",
}


class Memory:
    """Peak memory of this process since `restart`."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def restart(self) -> None:
        """Reset the peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident memory

    def peak(self) -> int:
        """Bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return self._status("VmHWM")

    def now(self) -> int:
        """Bytes."""
        return torch.cuda.memory_allocated() if self.cuda else self._status("VmRSS")

    @staticmethod
    def _status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024


def _import_all(build: Callable[[Job], nn.Module], job: Job) -> None:
    """Take a tiny step, so that what libraries set up at first use does not count as the step's memory."""
    tiny = {**job, "I": 8, "O": 8, "H": 8, "N": 64, "latents": 64, "K": 2, "tokens": 16}
    with torch.device(job["device"]):
        model, x = build(tiny), torch.randn(16, 8)
    with torch.autocast(job["device"], torch.bfloat16):
        output = model(x) if not isinstance(model, Products) else F.linear(x, torch.randn(8, 8, requires_grad=True))
    output.sum().backward()


class Running:
    """A contestant that is built and takes steps."""

    def __init__(self, name: str, job: Job):
        self.device, (build, in_bf16) = job["device"], CONTESTANTS[name]
        torch.manual_seed(0)
        self.memory = Memory(self.device)
        _import_all(build, job)
        self.memory_before = self.memory.now()
        with torch.device(self.device):
            self.model = build(job)
            self.x, self.y = torch.randn(job["tokens"], job["I"]), torch.randn(job["tokens"], job["O"])
        self.autocast = torch.autocast(self.device, torch.bfloat16) if in_bf16 else contextlib.nullcontext()
        self.optimizer: torch.optim.Optimizer | None = None
        self.model.requires_grad_(job["mode"] == "train")
        if job["mode"] == "train" and not isinstance(self.model, Products):
            # The Trainer's AdamW is the fused one; the plain code has the default, which on a CPU takes several times
            # as long.
            fused = {} if name in PLAIN and "fused" not in name else {"fused": True}
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **fused)

    def _step(self) -> dict[int, int]:
        """Take a step; return address and bytes of the gradients, which are freed at its end."""
        gradients: dict[int, int] = {}
        with self.autocast:
            output = self.model(self.x)
        if self.optimizer is not None:
            loss = (output.float() - self.y).square().sum(-1).mean()
            if getattr(self.model, "router", None) is not None:
                from mxd.trainers.decomposition_trainer import ROUTER_TOKENS
                from mxd.trainers.router import router_loss

                loss = loss + router_loss(self.model, self.x[::ROUTER_TOKENS])
            loss.backward()
            self.optimizer.step()
            gradients = dict(_storages(p.grad for p in self.model.parameters() if p.grad is not None))
            self.optimizer.zero_grad()
        del output
        if self.device == "cuda":
            torch.cuda.synchronize()
        return gradients

    def timed_step(self) -> dict[str, float]:
        """Take a step; return its seconds and memory."""
        if isinstance(self.model, Products):
            self.model.step(self.x)
            return {"seconds": self.model.limit, **self.model.seconds}
        self.memory.restart()
        started = time.perf_counter()
        gradients = self._step()
        seconds = time.perf_counter() - started
        held = sum(p.nbytes for p in self.model.parameters()) + self.x.nbytes + self.y.nbytes
        if self.optimizer is not None:
            states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
            held += sum(gradients.values()) + sum(t.nbytes for t in states)
        return {
            "seconds": seconds,
            "peak_bytes": self.memory.peak() - self.memory_before - held,
            "parameter_bytes": held,
        }

    def tensor_bytes(self) -> dict[str, float]:
        """Return the peak of tensors beyond parameters, optimiser state and gradients, by torch's allocator on a CPU.

        On a GPU `peak_bytes` is that already. Call it last, because the profiler takes memory itself.
        """
        if isinstance(self.model, Products) or self.device == "cuda":
            return {}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            gradients = self._step()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        changes = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
        for address, size in gradients.items():  # the last allocation at that address
            made = next(e for e in reversed(changes) if e["args"]["Addr"] == address and e["args"]["Bytes"] > 0)
            made["args"]["Bytes"] -= size
        return {"tensor_bytes": max(accumulate(e["args"]["Bytes"] for e in changes))}


def _storages(tensors: Iterable[Tensor]) -> Iterator[tuple[int, int]]:
    for tensor in tensors:
        yield tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()


def main() -> None:
    """Time a step for every line of standard input; at its end, what the tensors of a step hold."""
    name, job = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(job["threads"])
    ours_in_training = job["mode"] == "train" and name not in PLAIN and not name.endswith("memory given back")
    kept = ours_in_training or name.endswith("memory kept")
    with freed_memory_kept() if kept else contextlib.nullcontext():
        running = Running(name, job)
        running.timed_step()  # warm-up
        print(json.dumps({"ready": True}), flush=True)  # noqa: T201
        for _ in sys.stdin:
            print(json.dumps(running.timed_step()), flush=True)  # noqa: T201
        print(json.dumps(running.tensor_bytes()), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
