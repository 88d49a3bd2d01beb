"""`--cache`: decompose and frontier train on activations that were recorded once."""

import json
import shutil

import pytest
import torch
from commands import refused, run
from safetensors.torch import load_file

from mxd import DecompositionOptions, FrontierOptions, decompose, measure_frontier
from mxd.base import activation_cache

FEW = {"num_experts": 64, "num_experts_per_tok": 4, "tokens": 512, "batch_tokens": 256, "evaluation_tokens": 128,
       "dtype": "bfloat16", "layers": [1, 2], "training": {"disable_tqdm": True}}  # fmt: skip


def decomposed(folder, **changes):
    """Weights and training losses of a run."""
    decompose(DecompositionOptions(output=str(folder), **{**FEW, **changes}))
    log = json.loads((folder / "training_log.json").read_text())
    weights = {name: value for path in folder.glob("model*.safetensors") for name, value in load_file(path).items()}
    return weights, [{name: value for name, value in entry.items() if "loss" in name} for entry in log]


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A run with a cache in two passes, and the folder of the cache."""
    folder = tmp_path_factory.mktemp("cached")
    found = decomposed(folder / "out", layers_per_pass=1, cache=str(folder / "cache"))
    evaluation = (folder / "out" / "evaluation.json").read_text()
    assert str(folder / "cache") not in evaluation and "cache:" in (folder / "out" / "run.yaml").read_text()
    return found, folder / "cache"


@pytest.fixture
def unrecorded(monkeypatch):
    monkeypatch.setattr(activation_cache, "_record", lambda *_: pytest.fail("it was recorded again"))


def test_a_run_with_a_cache_is_the_run_without(cached, tmp_path):
    (weights, losses), _ = cached
    expected, expected_losses = decomposed(tmp_path / "out", layers_per_pass=1)
    assert expected_losses == losses
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.usefixtures("unrecorded")
def test_other_trainings_and_methods_share_it(cached, tmp_path):
    _, cache = cached
    decomposed(tmp_path / "a", layers=[2], method="transcoder", tokens=256, cache=str(cache))
    small = {"methods": ["skip_transcoder"], "num_experts_per_tok": [4], "match_transcoder": 8}
    same = {name: FEW[name] for name in ("tokens", "batch_tokens", "evaluation_tokens", "dtype", "layers")}
    options = FrontierOptions(**small, **same, cache=str(cache), output=str(tmp_path / "frontier"))
    assert len(measure_frontier(options, progress=False)["points"]) == 1
    assert not (tmp_path / "frontier" / "recording").exists()


def test_a_text_shorter_than_the_training_is_cached_once_and_repeated(tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_text("".join(json.dumps({"text": f"The year {n} was a good one. " * 60}) + "\n" for n in range(2)))
    other = tmp_path / "b.jsonl"
    other.write_text(json.dumps({"text": "Another text of some words. " * 60}) + "\n")
    how = {"dataset": [str(text)], "heldout_dataset": [str(other)], "layers": [2], "tokens": 1024}
    live = decomposed(tmp_path / "live", **how)
    kept = decomposed(tmp_path / "kept", **how, cache=str(tmp_path / "cache"))
    rows, tokens = json.loads((tmp_path / "cache" / "manifest.json").read_text())["manifest"]["shape"]
    assert rows * tokens < how["tokens"] and live[1] == kept[1]
    assert all(torch.equal(live[0][name], kept[0][name]) for name in live[0])


def test_what_does_not_fit_is_refused_before_the_output_is_touched(cached, tmp_path, monkeypatch, capsys):
    _, cache = cached
    flags = ["--layers", "1,2", "--num-experts", "64", "-k", "4", "--tokens", "512", "--batch-tokens", "256"]
    out = tmp_path / "out"
    refusals = {
        "different: dtype": ["--cache", cache],
        "name one outside of it": ["--cache", out / "cache"],
        "name a folder with --cache": ["--cache", tmp_path / "sequential.yaml"],
        "leave one of them out": ["--cache", cache, "--config", tmp_path / "sequential.yaml"],
    }
    (tmp_path / "sequential.yaml").write_text("sequential: true\n")
    for words, changes in refusals.items():
        error = " ".join(refused(monkeypatch, capsys, "decompose", *flags, "--output", out, *changes).split())
        assert words in error.replace("│ ", ""), error
        assert not out.exists()
    broken = shutil.copytree(cache, tmp_path / "broken")
    content = bytearray((broken / "layer_2_inputs.bin").read_bytes())
    content[5] ^= 1
    (broken / "layer_2_inputs.bin").write_bytes(content)
    code, _, error = run("decompose", *flags, "--dtype", "bfloat16", "--cache", broken, "--output", out)
    assert code != 0 and "layer_2_inputs.bin" in error and not out.exists()
