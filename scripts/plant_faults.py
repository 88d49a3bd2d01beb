"""Plant deliberate faults in the library, one at a time, and check that the tests catch each of them.

    python scripts/plant_faults.py

Run it with the interpreter that the tests have (`.venv/bin/python`); it takes about 10 minutes on two cores. Each
fault is planted in a scratch copy of this tree, so the tree itself is never changed. The tests that should catch it
then run there with `pytest -x`: it is caught if one fails. As a control, the tests that failed then run in a copy
without a fault, where all must pass. `--only NAME ...` runs some faults and leaves the file of results as it is.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "planted_faults.json"
# Packages whose code must come from the scratch copy, and the rooms that are installed inside `mxd`.
PACKAGES = (
    "mxd", "mxd.base", "mxd.data", "mxd.evaluation", "mxd.experts", "mxd.hub_cards", "mxd.modeling_mxd", "mxd.trainers",
)  # fmt: skip
ROOMS = ("hub_cards", "modeling_mxd", "trainers")
LEFT_OUT = (".git", ".venv*", ".*_cache", "__pycache__", "build", "demo-output", "shared", "*.egg-info")
TIMEOUT_SECONDS = 1800
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", re.MULTILINE)


class Fault(NamedTuple):
    """A deliberate fault, its place, and the test that should catch it."""

    name: str
    what: str
    """what the faulty code does wrong"""
    file: str
    text: str
    """occurs exactly once in the file"""
    replacement: str
    test: str
    """file or node id"""


FAULTS = [
    Fault(
        "gate-gradient-sign",
        "the gate's gradient of its input has the wrong sign",
        "modeling_mxd/functional.py",
        "        grad_x = _expert_sum(grad, indices, weight)\n",
        "        grad_x = -_expert_sum(grad, indices, weight)\n",
        "tests/modeling_mxd/test_functional.py::test_topk_gate_passes_gradcheck",
    ),
    Fault(
        "gate-gradient-relu-mask",
        "the gate's gradients ignore the ReLU: experts that did not fire learn too",
        "modeling_mxd/functional.py",
        "    grad = grad_values.where(values > 0, 0.0)\n",
        "    grad = grad_values\n",
        "tests/modeling_mxd/test_functional.py::test_topk_gate_passes_gradcheck",
    ),
    Fault(
        "largest-off-by-one",
        "TopK by blocks names columns behind the last whole block one block too early",
        "modeling_mxd/functional.py",
        "in_blocks, at + (blocks - k) * _BLOCK)\n",
        "in_blocks, at + (blocks - k - 1) * _BLOCK)\n",
        "tests/modeling_mxd/test_functional.py::test_the_largest_positive_scores_are_those_of_topk",
    ),
    Fault(
        "output-bias-left-out",
        "an MxD layer does not add its output bias",
        "modeling_mxd/layers.py",
        "        y = summed * self.decoder(self.hidden(x))\n"
        "        return y if self.output_bias is None else y + self.output_bias\n",
        "        return summed * self.decoder(self.hidden(x))\n",
        "tests/modeling_mxd/test_layers.py::test_equals_the_oracle_in_float32",
    ),
    Fault(
        "intervention-sign",
        "intervene(add=...) subtracts",
        "modeling_mxd/interventions.py",
        "list(self.set.items()) + list(self.add.items()):\n",
        "list(self.set.items()) + [(e, -value) for e, value in self.add.items()]:\n",
        "tests/modeling_mxd/test_interventions.py::test_output_is_the_decoding_of_the_changed_coefficients",
    ),
    Fault(
        "restore-missing",
        "restore() leaves the replacement in the model",
        "modeling_mxd/surgery.py",
        "        self.site.put(self.original)\n",
        "        self.site.put(self._installed)\n",
        "tests/modeling_mxd/test_surgery.py::test_the_very_same_modules_come_back",
    ),
    Fault(
        "verification-leaves-eval-mode",
        "the check that surgery is exact leaves the model in eval mode",
        "modeling_mxd/surgery.py",
        "            module.training = True\n",
        "            module.training = False\n",
        "tests/modeling_mxd/test_verification.py::test_the_model_is_as_it_was",
    ),
    Fault(
        "routing-wrong-group",
        "hierarchical routing takes a group's rank among the open ones for the group itself",
        "modeling_mxd/functional.py",
        "        group = opened[part].gather(1, at // group_size)\n",
        "        group = at // group_size\n",
        "tests/modeling_mxd/test_hierarchical_routing.py::test_output_and_gradients_are_the_oracles",
    ),
    Fault(
        "packing-last-row",
        "packing drops the last row of a batch when it ends exactly with the text",
        "mxd/data/packing.py",
        "stream[begin : begin + context_length])) >= context_length:\n",
        "stream[begin : begin + context_length])) > context_length:\n",
        "tests/data/test_packing.py::test_rows_are_the_token_stream",
    ),
    Fault(
        "packing-bos-of-zero",
        "packed rows have no BOS token if its id is 0",
        "mxd/data/tokens.py",
        "    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]\n",
        "    return [tokenizer.bos_token_id] if tokenizer.bos_token_id else []\n",
        "tests/data/test_packing.py::test_every_row_starts_with_a_bos_of_id_zero",
    ),
    Fault(
        "distillation-reduction",
        "the distillation loss is propagated back as the mean over layers instead of their sum",
        "trainers/distillation_trainer.py",
        "            self.accelerator.backward(loss)  #",
        "            self.accelerator.backward(loss / len(layers))  #",
        "tests/trainers/test_distillation_trainer.py::test_layerwise_backward_equals_the_whole_loss",
    ),
    Fault(
        "accumulation-count",
        "the loss is divided by the tokens of the first micro-batch only",
        "trainers/decomposition_trainer.py",
        "for batch in batches]).sum()\n",
        "for batch in batches[:1]]).sum()\n",
        "tests/trainers/test_distillation_trainer.py::test_accumulated_micro_batches_equal_one_batch",
    ),
    Fault(
        "nmse-denominator",
        "the normalised error divides by the norm of the prediction",
        "mxd/evaluation/metrics.py",
        "    norm = squared_norm(target)\n    return torch.where",
        "    norm = squared_norm(prediction)\n    return torch.where",
        "tests/evaluation/test_metrics.py::test_errors_by_hand",
    ),
    Fault(
        "next-token-mask",
        "a prediction counts although its next token is padding",
        "mxd/base/masks.py",
        "    return mask[:, :-1] & mask[:, 1:]\n",
        "    return mask[:, :-1]\n",
        "tests/evaluation/test_metrics.py::test_padding_is_neither_source_nor_target",
    ),
    Fault(
        "interval-without-clusters",
        "the interval of a paired difference takes the tokens of a row as independent",
        "mxd/evaluation/paired.py",
        "        residuals = sums - self.mean * counts\n",
        "        residuals = (sums - self.mean * counts) / counts.sqrt()\n",
        "tests/evaluation/test_paired.py::test_rows_of_one_length_have_the_standard_error_of_their_means",
    ),
    Fault(
        "revision-not-pinned",
        "the files of a repo are not all read at one commit",
        "modeling_mxd/loading.py",
        'access if commit is None else {**access, "revision": commit}, path)\n',
        "access, path)\n",
        "tests/hub_cards/test_load.py::test_all_files_are_of_one_commit_though_somebody_pushes_meanwhile",
    ),
    Fault(
        "header-shapes",
        "the shapes in a weight file's header are not compared with the config",
        "modeling_mxd/loading.py",
        "            elif shape != shapes[key]:\n",
        "            elif shape is None:\n",
        "tests/modeling_mxd/test_configuration_mxd.py::test_a_folder_whose_weights_have_other_sizes_is_refused",
    ),
    Fault(
        "push-keeps-stale-weights",
        "weights of an earlier push that are no more stay in the repo",
        "hub_cards/push.py",
        'if _STALE.fullmatch(name) or name.split("/")[0] in self.folders}\n',
        'if name.split("/")[0] in self.folders}\n',
        "tests/hub_cards/test_push.py::test_a_second_push_replaces_and_keeps_what_was_written_by_hand",
    ),
    Fault(
        "card-drops-text",
        "an update of a model card drops the text that a person wrote",
        "hub_cards/updating.py",
        "        text = _GENERATED.sub(lambda _: generated.group(), text, count=1)\n",
        "        text = generated.group()\n",
        "tests/hub_cards/test_card.py::test_an_update_keeps_what_was_written_by_hand",
    ),
    Fault(
        "resume-without-scales",
        "a resumed training does not load the activation scales of its checkpoint",
        "trainers/decomposition_trainer.py",
        "        self.scales = {int(layer): ActivationScales(",
        "        _ = {int(layer): ActivationScales(",
        "tests/trainers/test_distillation_trainer.py::test_killed_and_resumed_equals_uninterrupted[routed]",
    ),
    Fault(
        "verification-always-equal",
        "the check that surgery is exact accepts any outputs",
        "modeling_mxd/surgery.py",
        "    if len(before) != len(after) or not all(",
        "    if len(before) != len(after) and not all(",
        "tests/modeling_mxd/test_verification.py::test_a_caller_that_runs_but_gives_other_values_is_refused",
    ),
    Fault(
        "largest-block-boundary",
        "TopK by blocks takes the first column behind the blocks for one inside them",
        "modeling_mxd/functional.py",
        "torch.where(at < k * _BLOCK, in_blocks,",
        "torch.where(at <= k * _BLOCK, in_blocks,",
        "tests/modeling_mxd/test_functional.py::test_the_largest_may_be_the_first_column_behind_the_last_whole_block",
    ),
    Fault(
        "push-without-parent",
        "a push does not say on which commit it is based, so it overwrites a commit made meanwhile",
        "hub_cards/push.py",
        '"create_pr": self.create_pr, "parent_commit": repo.commit}\n',
        '"create_pr": self.create_pr}\n',
        "tests/hub_cards/test_push.py::test_a_commit_between_look_up_and_push_is_not_overwritten",
    ),
]


def main() -> int:
    """Run the faults that were asked for; return 1 if one was missed or the control fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[fault.name for fault in FAULTS])
    parser.add_argument("--workers", type=int, default=2, help="faults at the same time, with one thread each")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if options.only is None or fault.name in options.only]
    for fault in faults:
        faulty(fault)  # refuse all before anything runs

    results = []
    with ThreadPoolExecutor(options.workers) as pool:
        for result in pool.map(plant, faults):
            results.append(result)
            print(" | ".join(map(str, result.values())), flush=True)
    by = list(dict.fromkeys(result["by"] for result in results if result["caught"]))
    with scratch_copy() as copy:
        code, output, seconds = run_tests(copy, by) if by else (0, "", 0.0)
    control = {"tests": len(by), "passed": code == 0, "seconds": seconds}
    print(f"{sum(result['caught'] for result in results)} of {len(faults)} caught; without a fault: {control}")
    if code != 0:
        print(output[-4000:], file=sys.stderr)
    if options.only is None:
        RESULTS.write_text(json.dumps({"faults": results, "control": control}, indent=1) + "\n", encoding="utf-8")
    return int(code != 0 or not all(result["caught"] for result in results))


def faulty(fault: Fault) -> str:
    """Return the file's content with the fault in it.

    Raises:
        ValueError: the text does not occur exactly once.
    """
    content = (ROOT / fault.file).read_text(encoding="utf-8")
    if (count := content.count(fault.text)) != 1:
        raise ValueError(f"{fault.name}: the text to replace occurs {count} times in {fault.file}: {fault.text!r}")
    content = content.replace(fault.text, fault.replacement)
    compile(content, fault.file, "exec")
    return content


def plant(fault: Fault) -> dict[str, Any]:
    """Run the test of one fault in a scratch copy that has it."""
    with scratch_copy() as copy:
        (copy / fault.file).write_text(faulty(fault), encoding="utf-8")
        code, output, seconds = run_tests(copy, [fault.test], "-x")
    if code not in (0, 1):  # no test ran to its end, which proves nothing
        print(f"{fault.name}: exit code {code}\n{output[-4000:]}", file=sys.stderr, flush=True)
    failed = _FAILED.search(output) if code == 1 else None
    by = failed and failed[1]
    return {"name": fault.name, "file": fault.file, "caught": by is not None, "by": by, "seconds": seconds}


@contextmanager
def scratch_copy() -> Iterator[Path]:
    """Copy the tree for the block, so that with PYTHONPATH at the copy every import finds the copy."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for room in ROOMS:  # an editable installation would lead these names to the tree itself
            (copy / "mxd" / room).symlink_to(Path("..") / room, target_is_directory=True)
        code = f"from importlib.util import find_spec\nfor n in {PACKAGES}: print(find_spec(n).origin)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd="/", env=environment(copy), capture_output=True, text=True, check=True)
        for origin in done.stdout.split():
            if not Path(origin).is_relative_to(copy):
                raise RuntimeError(f"{origin} would be imported, which is not in the scratch copy {copy}")
        yield copy


def environment(copy: Path) -> dict[str, str]:
    """Return the environment for processes of the scratch copy: one thread, and imports from it."""
    return {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_tests(copy: Path, tests: list[str], *options: str) -> tuple[int | None, str, float]:
    """Run pytest; return exit code (None: it took too long), output and seconds."""
    command = [sys.executable, "-m", "pytest", *tests, "-rfE", "--tb=short", "-p", "no:cacheprovider", *options]
    started = time.monotonic()
    process = subprocess.Popen(
        command, cwd=copy, env=environment(copy), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the session that was started above
        output, _ = process.communicate()
        code = None
    return code, output, round(time.monotonic() - started, 1)


if __name__ == "__main__":
    sys.exit(main())
