"""Activation cache: inputs and outputs of a frozen model's MLPs for fixed rows of token ids, stored on disk.

One pass over the text serves any number of trainings of the same layers, and any number of epochs:

    rows = materialize(pack(documents, tokenizer, 256), tokens=10**6)[:]["input_ids"]    # (rows, tokens)
    cache = ActivationCache.record("cache", model, [15], rows)
    DistillationTrainer(decomposition, model, arguments, activations=cache).train()

A token takes 2 (I + O) bytes per layer, in bfloat16: 2.3 kB with I = O = 576, so 10 M tokens take 23 GB.

Each layer and side has a file, its shard, with the rows in the order of recording; a training in that order reads it
from beginning to end. The manifest holds checksums of all rows that are on the disk, and is replaced after they are.
"""

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.utils.data import Dataset

from mxd.modeling_mxd import find_mlps, site_of
from mxd.modeling_mxd.surgery import running_device

from .capture import capture_mlps
from .files import replace_text
from .forward import evaluating
from .progress import progress_bar

logger = logging.getLogger(__name__)

MANIFEST_NAME = "manifest.json"
_ROWS_NAME = "rows.bin"
_LOCK_NAME = ".lock"  # held by the process that records
_SIDES = ("inputs", "outputs")
_AGAIN = "delete the folder, or record it anew with overwrite"
_SAVE_SECONDS = 10
_PART_BYTES = 8 << 20  # read together for a checksum


class ActivationCache(Dataset[dict[str, Tensor]]):
    """Inputs and outputs of a model's MLPs for rows of token ids, read from a folder that `record` wrote.

    As a dataset it yields the rows `{"input_ids": (tokens)}` in the order of recording. Called with a batch of those
    rows it returns their activations. Several processes can read the same folder.

    Args:
        folder: The folder.
        verify: Compare all checksums, which reads the files once. Their sizes are compared in any case.
        progress: Show a progress bar of that.

    Attributes:
        layers: Indices of the recorded layers.
        rows: Token ids, (rows, tokens) int32.
        manifest: Base model, dtype, layers, stack, site, digest and shape of the rows, widths (I, O) of the layers.

    Raises:
        ValueError: The folder holds no complete cache, or a file of it is broken.
    """

    def __init__(self, folder: str | os.PathLike[str], verify: bool = True, progress: bool = False):
        folder = Path(folder)
        self.manifest, recorded, sums = _read_state(folder)
        if not self.manifest or recorded < self.manifest["shape"][0]:
            raise ValueError(f"{folder} holds no complete activation cache: create it with ActivationCache.record")
        files = _open(folder, self.manifest, "c")
        if verify:
            _check_sums(folder, files, sums, progress)
        self.layers: list[int] = self.manifest["layers"]
        self.rows = files[_ROWS_NAME]
        self._activations = {layer: tuple(files[_file_name(layer, side)] for side in _SIDES) for layer in self.layers}
        self._index = {rows_digest(row): index for index, row in enumerate(self.rows)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index].long()}

    def __call__(
        self, batch: Mapping[str, Tensor], layers: Iterable[int] | None = None
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the activations of a batch of recorded rows, which may come in any order.

        Args:
            batch: `input_ids` (batch, tokens).
            layers: Layers to read; by default all.

        Returns:
            {layer: (x, y)} as `capture_mlps` returns them, in bfloat16.

        Raises:
            ValueError: A row was not recorded.
        """
        try:
            places = [self._index[rows_digest(row)] for row in batch["input_ids"].cpu()]
        except KeyError:
            raise ValueError("the batch has a row that is not in the activation cache: train on its own rows") from None
        following = places == [*range(places[0], places[0] + len(places))]  # then nothing is copied here
        index = slice(places[0], places[0] + len(places)) if following else torch.tensor(places)
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
        """Run a model over rows once and store what its MLPs read and write.

        An interrupted recording of the same rows continues where it stopped; a complete one is opened, also if it has
        further layers, and further rows behind these.

        Args:
            folder: Folder to write.
            model: Model that reads token ids. Its mode is restored.
            layers: Indices of the layers.
            rows: Token ids, (rows, tokens), without padding.
            stack, site: Stack of layers, and MLP of a layer; see `modeling_mxd.find_mlps`.
            rows_per_step: Rows of one forward pass.
            overwrite: Replace a cache of another model, text or layers, and a broken one.
            progress: Show a progress bar, in tokens.

        Raises:
            ValueError: Before the model runs: `rows` is empty, the folder holds another cache, another process records
                into it, a layer runs several times in a forward pass, or the model is an encoder–decoder model.
            OSError: Before the model runs: the disk has too little space.
            SurgeryError: The model has no such layer.
        """
        folder = Path(folder)
        wanted, seen = _manifest(model, layers, rows, stack, site), _read_manifest(folder)
        try:
            found, recorded, sums = _read_state(folder)
            if found and recorded == found["shape"][0] and _serves(folder, found, wanted, rows):
                cache = cls(folder, progress=progress)
                cache.rows = cache.rows[: len(rows)]
                return cache
            if found == wanted and recorded:
                _check_sums(folder, _open(folder, found, "c"), sums, progress)
        except ValueError:
            if not overwrite:
                raise
            found = {}
        if found and found != wanted and not overwrite:
            different = ", ".join(name for name in wanted if found.get(name) != wanted[name])
            raise ValueError(f"{folder} holds another cache (different: {different}): name another, or overwrite it")
        folder.mkdir(parents=True, exist_ok=True)
        with _recording(folder, seen):
            if found != wanted:
                for path in (folder / MANIFEST_NAME, folder / _ROWS_NAME, *folder.glob("layer_*_*puts.bin")):
                    path.unlink(missing_ok=True)
            _check_space(folder, wanted)
            if found != wanted:
                _write_state(folder, wanted, 0, {})
            _record(folder, model, rows, rows_per_step, progress)
        return cls(folder, verify=False)


def rows_digest(rows: Tensor) -> str:
    """Return a digest of token ids of any shape."""
    return hashlib.blake2b(rows.to("cpu", torch.int32).contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def _manifest(model: nn.Module, layers: Sequence[int], rows: Tensor, stack: str | None, site: str) -> dict[str, Any]:
    if rows.ndim != 2 or not rows.numel():
        raise ValueError(f"rows must be (rows, tokens) with at least one token, got {tuple(rows.shape)}")
    found, config = find_mlps(model, stack, site), getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or any(site_of(found, layer).repeated for layer in layers):
        raise ValueError(
            "only layers that run once for the token ids of a batch can be cached: train without activations="
        )
    with evaluating(model):
        probe = capture_mlps(model, list(layers), rows[:1, :2].to(running_device(model)), stack=stack, site=site)
    return {
        "base_model": getattr(config, "_name_or_path", None) or None,
        "base_model_revision": getattr(config, "_commit_hash", None),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "layers": list(layers),
        "stack": stack,
        "site": site,
        "rows": rows_digest(rows),
        "shape": list(rows.shape),
        "widths": [[tensor.shape[-1] for tensor in probe[layer]] for layer in layers],
    }


def _file_name(layer: int, side: str) -> str:
    return f"layer_{layer}_{side}.bin"


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST_NAME
    return path.read_bytes() if path.is_file() else b""


@contextmanager
def _recording(folder: Path, seen: bytes) -> Iterator[None]:
    """Let one process at a time record; raise a ValueError if another does, or has since the manifest was `seen`."""
    try:
        with FileLock(folder / _LOCK_NAME, timeout=0):
            if _read_manifest(folder) != seen:
                raise Timeout(str(folder))
            yield
    except Timeout:
        again = "wait until it is done, or name another folder"
        raise ValueError(f"another process records the activation cache {folder}: {again}") from None


def _read_state(folder: Path) -> tuple[dict[str, Any], int, dict[str, list[int]]]:
    """Return the manifest, the number of rows recorded, and checksums; all of them empty if the folder has no cache.

    Checksums are those of the rows up to each of "ends", by file.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}, 0, {}
    try:
        state = json.loads(_read_manifest(folder))
        manifest, recorded, sums = state["manifest"], state["recorded"], state["checksums"]
        ends = sums.get("ends", [])
        if (ends or [0])[-1] != recorded or any(len(sums[name]) != len(ends) for name in _layouts(manifest) if sums):
            raise ValueError("not all rows have checksums")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of an activation cache: {_AGAIN}") from error
    return manifest, recorded, sums


def _serves(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], rows: Tensor) -> bool:
    """Return whether a complete cache holds all that is wanted: the same rows first, and the layers."""
    of_rows_and_layers = ("rows", "shape", "layers", "widths")
    same = all(found.get(name) == wanted[name] for name in wanted if name not in of_rows_and_layers)
    if not same or not set(wanted["layers"]) <= set(found["layers"]):
        return False
    return torch.equal(_open(folder, found, "c")[_ROWS_NAME][: len(rows)], rows.to("cpu", torch.int32))


def _write_state(folder: Path, manifest: Mapping[str, Any], recorded: int, sums: Mapping[str, list[int]]) -> None:
    state = {"manifest": manifest, "recorded": recorded, "checksums": sums}
    replace_text(folder / MANIFEST_NAME, json.dumps(state, indent=1) + "\n")


def _check_space(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Say how much disk the files take, and raise an OSError if there is less."""
    there = [(folder / name).stat().st_size for name in _sizes(manifest) if (folder / name).is_file()]
    needed, free = sum(_sizes(manifest).values()) - sum(there), shutil.disk_usage(folder).free
    said = f"the activation cache takes {needed / 1e9:.3g} GB more of the disk, which has {free / 1e9:.3g} GB free"
    if needed > free:
        raise OSError(errno.ENOSPC, f"{said}: use fewer tokens or layers, or another folder", str(folder))
    if needed:
        logger.warning("%s: %s", folder, said)


def _sizes(manifest: Mapping[str, Any]) -> dict[str, int]:
    return {name: dtype.itemsize * math.prod(shape) for name, (dtype, shape) in _layouts(manifest).items()}


def _continued(checksum: int, rows: Tensor) -> int:
    """Return the CRC-32 of rows that follow others."""
    for part in rows.split(max(1, _PART_BYTES // rows[:1].nbytes)):
        checksum = zlib.crc32(part.contiguous().view(torch.uint8).numpy(), checksum)
    return checksum


def _check_sums(folder: Path, files: Mapping[str, Tensor], sums: Mapping[str, list[int]], progress: bool) -> None:
    """Raise a ValueError that names the first file whose rows are others than those recorded."""
    ends = sums.get("ends", [])
    for name, rows in progress_bar(files.items(), desc="check", unit="file", show=progress):
        for begin, end, recorded in zip([0, *ends[:-1]], ends, sums[name], strict=True):
            if _continued(0, rows[begin:end]) != recorded:
                raise ValueError(f"{folder / name} is broken in its rows {begin} to {end - 1}: {_AGAIN}")


def _layouts(manifest: Mapping[str, Any]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return the files of a cache: rows (rows, tokens), activations (rows, tokens, width)."""
    shape = tuple(manifest["shape"])
    layouts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {_ROWS_NAME: (torch.int32, shape)}
    for layer, widths in zip(manifest["layers"], manifest["widths"], strict=True):
        for side, width in zip(_SIDES, widths, strict=True):
            layouts[_file_name(layer, side)] = (torch.bfloat16, (*shape, width))
    return layouts


def _open(folder: Path, manifest: Mapping[str, Any], mode: Literal["r+", "c"]) -> dict[str, Tensor]:
    """Map the files, which may be larger than the memory, for writing or (copy on write) for reading.

    Raises:
        ValueError: A file to read is missing, or of another size.
    """
    tensors = {}
    for name, (dtype, shape) in _layouts(manifest).items():
        path, size = folder / name, dtype.itemsize * math.prod(shape)
        if mode == "r+":
            _reserve(path, size)
        elif not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or not {size} bytes long: {_AGAIN}")
        array = np.memmap(path, np.int32 if dtype == torch.int32 else np.int16, mode, shape=shape)
        tensors[name] = torch.from_numpy(array).view(dtype)
    return tensors


def _reserve(path: Path, size: int) -> None:
    """Allocate a file. A full disk raises OSError here; on writing to the mapped file it would kill the process."""
    with path.open("a+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _record(folder: Path, model: nn.Module, rows: Tensor, rows_per_step: int, progress: bool) -> None:
    """Record the rows that are missing, and store how far it came, also after an interrupt."""
    manifest, done, sums = _read_state(folder)
    if done == len(rows):
        return
    files, device = _open(folder, manifest, "r+"), running_device(model)
    files[_ROWS_NAME].copy_(rows)
    sums = sums or {key: [] for key in ("ends", *files)}
    fresh = dict.fromkeys(files, 0)

    def store() -> None:
        """Write how far it came, once the rows are on the disk."""
        if done > (sums["ends"] or [0])[-1]:
            for name in files:
                with (folder / name).open("rb") as file:
                    os.fsync(file)
            for name, end in {**fresh, "ends": done}.items():
                sums[name].append(end)
        _write_state(folder, manifest, done, sums)

    where = {"stack": manifest["stack"], "site": manifest["site"]}
    bar = progress_bar(
        desc="record", total=rows.numel(), initial=rows[:done].numel(), unit="tok", unit_scale=True, show=progress
    )
    saved = time.monotonic()
    try:
        with bar, evaluating(model):
            for part in rows[done:].split(rows_per_step):
                for layer, pair in capture_mlps(model, manifest["layers"], part.to(device), **where).items():
                    for side, tensor in zip(_SIDES, pair, strict=True):
                        files[_file_name(layer, side)][done : done + len(part)] = tensor
                after = done + len(part)
                fresh = {name: _continued(one, files[name][done:after]) for name, one in fresh.items()}
                done = after
                bar.update(part.numel())
                if time.monotonic() - saved > _SAVE_SECONDS:
                    store()
                    fresh, saved = dict.fromkeys(files, 0), time.monotonic()
    finally:
        store()
