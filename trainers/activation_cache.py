"""A teacher that runs once: what its MLPs read and wrote is kept on disk, for as many trainings as are wanted.

The frozen model is the largest cost of a distillation. Decompositions of the same layers that are compared train on the
same tokens, so one pass serves all, and serves several epochs:

    rows = materialize(pack(documents, tokenizer, 256), tokens=10**6)[:]["input_ids"]    # (rows, tokens)
    teacher = ActivationCache.record("recording", model, [15], rows)
    ReplayTrainer(decomposition, model, arguments, teacher).train()    # as often as is wanted

A token takes 2 (I + O) bytes a layer, in bfloat16: 2.3 kB with I = O = 576, so that 10 M tokens are 23 GB.
"""

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from mxd.base.capture import capture_mlps
from mxd.base.files import replace_text
from mxd.base.forward import evaluating
from mxd.modeling_mxd import MxDModel, find_mlps, site_of
from mxd.modeling_mxd.surgery import running_device

from .distillation_arguments import DistillationArguments
from .distillation_trainer import DistillationTrainer

RECORDING_NAME = "recording.json"
_ROWS_NAME = "rows.bin"
_SIDES = ("inputs", "outputs")
_SAVE_SECONDS = 10
# Elements of a parameter that its model's fingerprint looks at.
_SAMPLE = 4096


class ActivationCache(Dataset[dict[str, Tensor]]):
    """Inputs and outputs of a model's MLPs for rows of token ids, on disk in bfloat16.

    It is the training data, rows `{"input_ids": (tokens)}` in the order of recording, and gives for a batch of them
    what was recorded. Several processes can read one recording.

    Args:
        folder: where `record` wrote.

    Attributes:
        layers: indices of the recorded layers.
        rows: token ids, (rows, tokens) int32.
        fingerprint: of model, layers and text, by JSON values.

    Raises:
        ValueError: when the folder holds no complete recording.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        folder = Path(folder)
        state = _read_state(folder)
        self.fingerprint: dict[str, Any] = state.get("fingerprint", {})
        if not state or state["recorded"] < self.fingerprint["shape"][0]:
            raise ValueError(f"{folder} holds no complete recording: make it with ActivationCache.record")
        files = _open(folder, self.fingerprint, "r")
        self.layers: list[int] = list(self.fingerprint["layers"])
        self.rows = _tensor(files[_ROWS_NAME])
        self._activations = {
            layer: tuple(
                _tensor(files[_file_name(layer, side)]).view(torch.bfloat16).unflatten(0, self.rows.shape)
                for side in _SIDES
            )
            for layer in self.layers
        }
        self._index = {_row_key(row): index for index, row in enumerate(self.rows.numpy())}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index].long()}

    def __call__(
        self, batch: Mapping[str, Tensor], layers: Iterable[int] | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """{layer: (x, y)} in bfloat16, as `capture_mlps` gives them, of a batch of recorded rows in any order; of some
        layers, no other's files are read.

        Raises:
            ValueError: when a row was not recorded.
        """
        ids = batch["input_ids"].to("cpu", torch.int32).contiguous().numpy()
        try:
            index = torch.tensor([self._index[_row_key(row)] for row in ids])
        except KeyError:
            raise ValueError("the batch has a row that was not recorded: train on the recording's own rows") from None
        wanted = self.layers if layers is None else layers
        return {layer: (x[index], y[index]) for layer in wanted for x, y in [self._activations[layer]]}

    @classmethod
    @torch.no_grad()
    def record(
        cls,
        folder: str | os.PathLike[str],
        model: nn.Module,
        layers: Sequence[int],
        rows: Tensor,
        *,
        stack: str | None = None,
        site: str = "mlp",
        rows_per_step: int = 8,
        overwrite: bool = False,
        progress: bool = False,
    ) -> "ActivationCache":
        """Run a model over rows once. What is there of the same recording is kept: one that was interrupted goes on,
        a finished one is opened.

        Args:
            folder: of the recording; made if need be.
            model: reads token ids; is put back as it was.
            layers: indices of the layers.
            rows: token ids, (rows, tokens), without padding.
            stack, site: which stack of layers, and which of a layer's MLPs; see `modeling_mxd.find_mlps`.
            rows_per_step: of one forward pass.
            overwrite: replace a recording of another model, text or layers.
            progress: show a progress bar, in tokens.

        Raises:
            ValueError: before the model runs: `rows` has no row, the folder holds another recording, the disk is too
                full, or layers that run several times in a pass or are an encoder–decoder model's.
            SurgeryError: no such layer.
        """
        folder = Path(folder)
        fingerprint = _fingerprint(model, layers, rows, stack, site)
        state = _read_state(folder)
        if state and state["fingerprint"] != fingerprint and not overwrite:
            different = _difference(state["fingerprint"], fingerprint)
            raise ValueError(
                f"the recording in {folder} is another, by {different}: name another folder, or overwrite it"
            )
        if not state or state["fingerprint"] != fingerprint:
            needed = recording_bytes(_tokens(fingerprint), fingerprint["widths"])
            freed = sum(path.stat().st_size for path in _files(folder)) if state else 0
            check_free_space(folder, needed - freed, "the recording")
            if state:
                _remove(folder)
            folder.mkdir(parents=True, exist_ok=True)
            _write_state(folder, {"fingerprint": fingerprint, "recorded": 0, "seconds": 0.0})
        _run(folder, model, rows, rows_per_step, progress)
        return cls(folder)


class ReplayTrainer(DistillationTrainer):
    """A `DistillationTrainer` whose teacher was recorded: no forward pass of it is run.

    Args:
        model: the decomposition, of layers that were recorded.
        teacher: the model that was recorded; what starts from its weights starts there.
        args: a `DistillationArguments`. With `train_sampling_strategy="sequential"` rows come in the order of
            recording in every epoch, and are read from the disk in their order.
        recording: what it trains on.
        **kwargs: as for `DistillationTrainer`; an `eval_dataset` has to be of recorded rows too.

    Raises:
        ValueError: when a layer was not recorded.
        SurgeryError: as `DistillationTrainer`.
    """

    def __init__(
        self,
        model: MxDModel,
        teacher: PreTrainedModel,
        args: DistillationArguments,
        recording: ActivationCache,
        **kwargs: Any,
    ):
        config, recorded = model.config, recording.fingerprint
        missing = [layer for layer in config.layers if layer not in recording.layers]
        if missing or config.where != {name: recorded[name] for name in config.where}:
            raise ValueError(
                f"recorded are layers {recording.layers} (stack {recorded['stack']}, site {recorded['site']}), and the "
                f"decomposition is of layers {config.layers} (stack {config.stack}, site {config.site})"
            )
        super().__init__(model, teacher, args, train_dataset=recording, **kwargs)
        self.recording = recording

    def capture(self, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Tensor]]:
        """What was recorded for these rows, on the trainer's device, in the teacher's dtype."""
        recorded, dtype = self.recording(inputs, self.model.config.layers), next(self.teacher.parameters()).dtype
        device = self.args.device
        return {layer: (x.to(device, dtype), y.to(device, dtype)) for layer, (x, y) in recorded.items()}


def recording_bytes(tokens: int, widths: Iterable[Sequence[int]]) -> int:
    """What a recording takes on disk; `widths` are (I, O) of its layers."""
    return tokens * (4 + sum(2 * sum(pair) for pair in widths))


def check_free_space(folder: Path, needed: int, what: str) -> None:
    """Refuse what the disk cannot hold.

    Raises:
        ValueError: naming the folder, and both numbers.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"{what} takes {needed / 1e9:,.1f} GB and {there} has {free / 1e9:,.1f} GB left: take fewer tokens or "
            "layers, or a folder on another disk"
        )


def weights_digest(model: nn.Module) -> str:
    """A fingerprint of a model's weights: names, shapes, and of every tensor elements that are spread over it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // _SAMPLE)].float().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + sample.tobytes())
    return digest.hexdigest()


def rows_digest(rows: Tensor) -> str:
    """A fingerprint of rows of token ids, (rows, tokens)."""
    return hashlib.blake2b(rows.to("cpu", torch.int32).contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _fingerprint(model: nn.Module, layers: Sequence[int], rows: Tensor, stack: str | None, site: str) -> dict[str, Any]:
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"rows must be (rows, tokens) with at least one token, got {tuple(rows.shape)}")
    found = find_mlps(model, stack, site)
    if any(site_of(found, layer).repeated for layer in layers) or _is_encoder_decoder(model):
        raise ValueError(
            "only layers that run once for the token ids of a batch can be recorded: train with a DistillationTrainer"
        )
    with evaluating(model):
        probe = capture_mlps(model, list(layers), rows[:1, :2].to(running_device(model)), stack=stack, site=site)
    return {
        "model": weights_digest(model),
        "layers": list(layers),
        "stack": stack,
        "site": site,
        "text": rows_digest(rows),
        "shape": list(rows.shape),
        "widths": [[tensor.shape[-1] for tensor in probe[layer]] for layer in layers],
    }


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _difference(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    names = {"model": "the model or its dtype", "shape": "the number of rows and tokens"}
    return ", ".join(names.get(name, f"the {name}") for name in wanted if there.get(name) != wanted[name])


def _tokens(fingerprint: Mapping[str, Any]) -> int:
    rows, length = fingerprint["shape"]
    return int(rows) * int(length)


def _file_name(layer: int | str, side: str) -> str:
    return f"layer_{layer}_{side}.bin"


def _row_key(row: Any) -> bytes:
    """Of the ids of one row, an int32 array."""
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _read_state(folder: Path) -> dict[str, Any]:
    """What `_write_state` wrote; empty where there is nothing."""
    path = folder / RECORDING_NAME
    if not path.is_file():
        return {}
    state = json.loads(path.read_text())
    if not isinstance(state, dict) or not {"fingerprint", "recorded"} <= state.keys():
        raise ValueError(f"{path} is not what ActivationCache.record writes")
    return state


def _remove(folder: Path) -> None:
    """A recording's files, and nothing else that may be there."""
    (folder / RECORDING_NAME).unlink()
    for path in _files(folder):
        path.unlink()


def _files(folder: Path) -> list[Path]:
    """Of a recording, but for its state."""
    sides = [file for side in _SIDES for file in folder.glob(_file_name("*", side))]
    return [*folder.glob(_ROWS_NAME), *sides]


def _write_state(folder: Path, state: Mapping[str, Any]) -> None:
    replace_text(folder / RECORDING_NAME, json.dumps(state, indent=1) + "\n")


def _open(folder: Path, fingerprint: Mapping[str, Any], mode: Literal["r+", "r"]) -> dict[str, Any]:
    """The files as arrays: ids (rows, tokens) int32, activations (tokens in all, width) as the bits of bfloat16."""
    ids, bits = np.dtype(np.int32), np.dtype(np.int16)
    layouts: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {_ROWS_NAME: (ids, tuple(fingerprint["shape"]))}
    for layer, widths in zip(fingerprint["layers"], fingerprint["widths"], strict=True):
        for side, width in zip(_SIDES, widths, strict=True):
            layouts[_file_name(layer, side)] = (bits, (_tokens(fingerprint), width))
    if mode == "r+":
        for name, (kind, shape) in layouts.items():
            _reserve(folder / name, kind.itemsize * int(np.prod(shape)))
    return {name: np.memmap(folder / name, kind, mode, shape=shape) for name, (kind, shape) in layouts.items()}


def _tensor(array: Any) -> Tensor:
    """A file that is mapped for reading alone, since it may be larger than the memory. Torch warns of such, because a
    write would be the end of the process; nothing here writes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _reserve(path: Path, size: int) -> None:
    """Make a file of its full size. A full disk is an OSError here; found out by writing to the mapped file, it would
    be the end of the process."""
    with path.open("a+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _run(folder: Path, model: nn.Module, rows: Tensor, rows_per_step: int, progress: bool) -> None:
    """Record what is missing, noting from time to time how far it is; also when it is interrupted."""
    state = _read_state(folder)
    fingerprint, done, seconds = state["fingerprint"], state["recorded"], state["seconds"]
    length = rows.shape[1]
    if done == len(rows):
        return
    files, device = _open(folder, fingerprint, "r+"), running_device(model)
    files[_ROWS_NAME][:] = rows.to("cpu", torch.int32).numpy()
    started = saved = time.monotonic()

    def note() -> None:
        for file in files.values():
            file.flush()
        _write_state(folder, {**state, "recorded": done, "seconds": round(seconds + time.monotonic() - started, 1)})

    bar = tqdm(
        desc="record", total=_tokens(fingerprint), initial=done * length, unit="tok", unit_scale=True,
        disable=not progress, dynamic_ncols=True,
    )  # fmt: skip
    try:
        with bar, evaluating(model):
            while done < len(rows):
                part = rows[done : done + rows_per_step]
                where = {"stack": fingerprint["stack"], "site": fingerprint["site"]}
                captured = capture_mlps(model, fingerprint["layers"], part.to(device), **where)
                for layer, pair in captured.items():
                    for side, tensor in zip(_SIDES, pair, strict=True):
                        bits = tensor.flatten(0, 1).to("cpu", torch.bfloat16).contiguous().view(torch.int16)
                        files[_file_name(layer, side)][done * length : done * length + len(bits)] = bits.numpy()
                done += len(part)
                bar.update(part.numel())
                if time.monotonic() - saved > _SAVE_SECONDS:
                    note()
                    saved = time.monotonic()
    finally:
        note()
