"""One point of a frontier, trained and measured in a process of its own: `python -m mxd.frontier_point`, which reads
what to do as JSON. `mxd.frontier` starts it."""

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from mxd.base.activation_cache import ActivationCache
from mxd.base.base_model import default_device, load_base_model
from mxd.base.files import replace_text
from mxd.data.texts import TextOptions
from mxd.evaluation import UntouchedLosses, faithfulness, save_evaluation
from mxd.modeling_mxd import MxDConfig, MxDModel
from mxd.trainers import DistillationArguments, DistillationTrainer

from .decompositions import load_decomposition, made_how
from .pipeline import DecompositionOptions, build_config, run_settings
from .runs import run_training, save_results, step_arguments

RECORDING, HELDOUT, POINTS = "recording", "heldout", "points"
UNTOUCHED_NAME, _ROWS_NAME = "untouched.safetensors", "rows.safetensors"


@dataclass
class Point:
    """One method at one K.

    Attributes:
        root: the frontier's folder.
        options: of its decomposition; `output` is the folder of it.
        config: of its decomposition.
        settings: all that its result depends on, by JSON values.
    """

    root: Path
    options: DecompositionOptions
    config: MxDConfig
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """Of its files: `skip-transcoder-k16`."""
        return point_name(self.options.method, self.options.num_experts_per_tok)

    @property
    def tokens(self) -> int:
        """That it trains on, those of every epoch counted."""
        return int(self.settings["tokens"] * self.options.training["num_train_epochs"])

    def file(self, ending: str) -> Path:
        """`.json` is there once it is finished, `.log` is what its process says, `.progress` how far it has trained."""
        return self.root / POINTS / f"{self.name}{ending}"

    def finished(self) -> dict[str, Any] | None:
        """Its results; None where it is not finished, or was with other settings."""
        found = self._found()
        return found["results"] if found["settings"] == self.settings else None

    def trained(self) -> bool:
        """Whether its decomposition is there, and only what it is measured on may be other."""
        found = self._found()["settings"]
        same = {**found, "heldout": None} == {**self.settings, "heldout": None}
        return same and any(Path(self.options.output).glob("*.safetensors"))

    def check_kept(self) -> None:
        """Refuse to make anew what is finished with other settings.

        Raises:
            ValueError: naming the first of them.
        """
        found, now = self._found(), self.settings
        if found["results"] is None or found["settings"] == now or self.trained():
            return
        before, now = ({**settings, **settings.get("training", {})} for settings in (found["settings"], now))
        name = next(name for name in {**now, **before} if name != "training" and before.get(name) != now.get(name))
        digest = name in ("weights", "text", "heldout")
        other = f"another {name}" if digest else f"{name} {before.get(name)!r}, not {now.get(name)!r}"
        raise ValueError(
            f"{self.file('.json')} is finished, with {other}: --overwrite makes it anew, another output keeps it"
        )

    def _found(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file(".json").read_text())
        except (OSError, ValueError):
            found = None
        known = isinstance(found, dict) and isinstance(found.get("settings"), dict) and "results" in found
        return found if known else {"settings": {}, "results": None}

    def job(self) -> str:
        """What its process reads."""
        return json.dumps({"root": str(self.root), "options": asdict(self.options), "settings": self.settings})


def options_of(job: Mapping[str, Any]) -> DecompositionOptions:
    """The options in what `Point.job` wrote."""
    options = job["options"]
    return DecompositionOptions(**{**options, "text": TextOptions(**options["text"])})


def point_name(method: str, k: int) -> str:
    """What a method at a K is called in folders."""
    return f"{method.replace('_', '-')}-k{k}"


def save_heldout(rows: Tensor, folder: Path) -> None:
    """Keep the rows (rows, tokens) that all points are measured on."""
    save_file({"rows": rows.contiguous()}, folder / _ROWS_NAME)


def heldout_batches(folder: Path) -> list[dict[str, Tensor]]:
    """Those rows, in batches of about 2,048 tokens."""
    rows = load_file(folder / _ROWS_NAME)["rows"]
    parts = rows.split(max(1, 2048 // rows.shape[1]))
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in parts]


def run_point(root: Path, options: DecompositionOptions, settings: Mapping[str, Any]) -> None:
    """Train a point, unless its decomposition is there, measure it, and write its result last."""
    set_seed(options.seed)
    folder = Path(options.output)

    def finish(results: dict[str, Any] | None) -> None:
        found = {"settings": settings, "results": results}
        replace_text(folder.with_name(f"{folder.name}.json"), json.dumps(found, indent=1) + "\n")

    model, tokenizer, commit = load_base_model(options.model, options.revision, options.dtype)
    if folder.is_dir():  # `clear` has left what was trained so
        decomposition, made = load_decomposition(str(folder)), made_how(str(folder))
        model.to(default_device())
    else:
        decomposition = MxDModel(build_config(model, commit, options))
        arguments = DistillationArguments(**step_arguments(options, folder))
        activations = ActivationCache(root / RECORDING)
        trainer = DistillationTrainer(decomposition, model, arguments, activations=activations)
        trainer.add_callback(ProgressFile(folder.with_name(f"{folder.name}.progress")))
        made = {"training": run_settings(options, trainer, run_training(trainer, tokenizer, options, None))}
        made["training"]["tokens_trained"] = int(settings["tokens"] * options.training["num_train_epochs"])
        save_evaluation({"settings": made}, folder)
        finish(None)  # trained: it is not trained again where measuring it fails
    known = UntouchedLosses.load(root / HELDOUT / UNTOUCHED_NAME)
    heldout = heldout_batches(root / HELDOUT)
    results = faithfulness(model, decomposition, heldout, settings=made, untouched=known)
    finish(save_results(results, decomposition, folder))


def clear(point: Point) -> None:
    """Remove what is left of a point that is to be made anew, save a decomposition that can be measured again."""
    folder = Path(point.options.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    trained = point.trained()
    if folder.is_dir() and not trained:
        shutil.rmtree(folder)
    for ending in (".log", ".progress", *([] if trained else [".json"])):
        point.file(ending).unlink(missing_ok=True)


class ProgressFile(TrainerCallback):
    """Writes which share of the training is done to a file, once a second or so."""

    def __init__(self, path: Path):
        self.path = path
        self.last = 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write it, when it is time."""
        if time.monotonic() - self.last >= 1 or state.global_step == state.max_steps:
            self.path.write_text(str(state.global_step / state.max_steps))
            self.last = time.monotonic()


def exit_at_end_of(file: int) -> None:
    """End this process once a pipe does, by its descriptor; the parent holds it open as long as it lives."""

    def wait() -> None:
        while os.read(file, 1):  # sys.stdin.read() would hold a lock that the interpreter wants when it ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """Read the job, one line, and do it."""
    job = json.loads(sys.stdin.buffer.readline())
    exit_at_end_of(sys.stdin.fileno())
    run_point(Path(job["root"]), options_of(job), job["settings"])


if __name__ == "__main__":
    main()
