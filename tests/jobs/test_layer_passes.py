"""Layers trained in groups, each with a pass of its own, and in the model whose earlier layers are replaced."""

import gc
import json
import shutil
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, TrainerCallback

from mxd import DecompositionOptions, DistillationTrainer, MxDModel, decompose
from mxd.base.base_model import load_base_model
from mxd.base.capture import capture_mlps
from mxd.jobs import decompose as job
from mxd.jobs.run_folder import RUN_NAME, START_NAME, Interrupted
from mxd.modeling_mxd import find_mlps

TRAINING = {"disable_tqdm": True, "calibration_tokens": 512, "statistics_tokens": 512, "logging_steps": 1}
TRAINING["save_steps"] = 100
LAYERS = [4, 0, 1]
PER_LAYER = {0: {"num_experts": 20}}


def options(folder, **changes):
    values = {"num_experts": 16, "num_experts_per_tok": 2, "tokens": 1024, "batch_tokens": 512, "learning_rate": 0.01}
    values |= {"evaluation_tokens": 512, "training": TRAINING, "layers": LAYERS, "output": str(folder)}
    return DecompositionOptions(**{**values, **changes})


def weights(folder):
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {(path.name[:5], name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def assert_same_weights(one, other):
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


class EndIn(TrainerCallback):
    """An exception in the second step of the pass over some layers; counts the steps of each pass."""

    def __init__(self, folder=None, error=None):
        self.folder, self.error, self.steps = folder, error, {}

    def on_step_begin(self, args, state, control, **kwargs):
        name = Path(args.output_dir).name
        self.steps[name] = self.steps.get(name, 0) + 1
        if name == self.folder and state.global_step == 1:
            raise self.error


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A run of three layers, at most two in a pass: folder, results."""
    folder = tmp_path_factory.mktemp("passes") / "grouped"
    return folder, decompose(options(folder, layers_per_pass=2, per_layer=PER_LAYER))


def test_the_passes_leave_one_decomposition_of_all_layers(grouped):
    folder, results = grouped
    assert not list(folder.glob("layers-*")) and not (folder / START_NAME).exists()
    assert {"config.json", "directions.safetensors", "tokenizer.json", "training_arguments.json"} <= {
        path.name for path in folder.iterdir()
    }
    model = MxDModel.from_pretrained(folder)
    assert model.config.layers == LAYERS and model.config.base_model_type == "llama"
    assert list(results["layers"]) == ["4", "0", "1"] and results["settings"]["training"]["layers"] == LAYERS
    made = results["settings"]["training"]
    assert made["tokens_trained"] == 1024 and made["seconds"] > 0 and made["layers_per_pass"] == 2
    log = json.loads((folder / "training_log.json").read_text())
    assert [entry["step"] for entry in log] == [1, 2] and model.config.layer(0).num_experts == 20
    for entry in log:
        losses = [entry[f"layer_{layer}/loss"] for layer in LAYERS]
        assert entry["loss"] == pytest.approx(sum(losses) / 3)


def test_a_pass_equals_a_run_of_its_layers(grouped, tmp_path):
    alone = decompose(options(tmp_path / "alone", layers=[4]))
    whole, part = MxDModel.from_pretrained(grouped[0]), MxDModel.from_pretrained(tmp_path / "alone")
    assert_same_weights(part.layer(4).state_dict(), whole.layer(4).state_dict())
    assert torch.equal(part.directions(4).direction, whole.directions(4).direction)
    assert alone["layers"]["4"] == grouped[1]["layers"]["4"]


def test_a_run_that_stops_in_a_later_pass_goes_on_from_there(grouped, tmp_path, monkeypatch):
    folder, how = tmp_path / "out", {"layers_per_pass": 2, "training": {**TRAINING, "save_steps": 1}}
    how["per_layer"] = PER_LAYER
    with monkeypatch.context() as patched:
        ending = EndIn("layers-4", KeyError("x"))
        patched.setattr(job, "DistillationTrainer", partial(DistillationTrainer, callbacks=[ending]))
        with pytest.raises(Exception, match=r"after step 1 of 2.*layers-4.*--resume"):
            decompose(options(folder, **how))
    assert {path.name for path in folder.iterdir()} == {"layers-0-1", "layers-4", RUN_NAME, START_NAME}
    assert not list((folder / "layers-0-1").glob("checkpoint-*"))
    folder = shutil.move(folder, tmp_path / "moved")
    with pytest.raises(ValueError, match=r"per_layer .*resume with the options of that run"):
        decompose(options(folder, **{**how, "per_layer": {0: {"num_experts": 21}}}, resume=True))
    counter = EndIn()
    with monkeypatch.context() as patched:
        patched.setattr(job, "DistillationTrainer", partial(DistillationTrainer, callbacks=[counter]))
        patched.setattr(job, "faithfulness", lambda *_, **__: {}[0])
        with pytest.raises(KeyError):
            decompose(options(folder, **how, resume=True))
    assert counter.steps == {"layers-4": 1}
    monkeypatch.setattr(job, "DistillationTrainer", None)  # what is trained is only measured again
    results = decompose(options(folder, **how, resume=True))
    assert_same_weights(weights(folder), weights(grouped[0]))
    assert results["layers"] == grouped[1]["layers"]


def test_an_interrupt_before_the_first_checkpoint_of_the_first_pass_keeps_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(DistillationTrainer, "calibrate", interrupt)
    with pytest.raises(Interrupted, match="nothing is kept"):
        decompose(options(tmp_path / "out", layers_per_pass=1))
    assert list((tmp_path / "out").iterdir()) == []


def test_sequential_training_sees_the_replaced_model(tmp_path, monkeypatch):
    seen, optimizers = {}, []

    class Recording(DistillationTrainer):
        def __init__(self, *args, **kwargs):
            gc.disable()
            super().__init__(*args, **kwargs)
            assert not any(optimizer() for optimizer in optimizers)  # memory holds one pass's

        def training_step(self, model, inputs, *args):
            (layer,) = self.model.config.layers
            seen[layer] = self.prepare_batch(inputs), self.capture(self.prepare_batch(inputs))[layer]
            optimizers.append(weakref.ref(self.optimizer.optimizer))
            return super().training_step(model, inputs, *args)

    monkeypatch.setattr(job, "DistillationTrainer", Recording)
    try:
        results = decompose(
            options(tmp_path / "out", layers=[1, 0, 4], sequential=True, tokens=512, per_layer={1: {"num_experts": 20}})
        )
    finally:
        gc.enable()
    assert results["settings"]["training"]["layers"] == [1, 0, 4] and len(optimizers) == 3
    whole = MxDModel.from_pretrained(tmp_path / "out").eval()
    assert [whole.config.layer(layer).num_experts for layer in (1, 0, 4)] == [20, 16, 16]
    model = load_base_model(options("x").model, None, "float32")[0].eval()
    for layer, before in ((0, []), (1, [0]), (4, [0, 1])):
        inputs, (x, y) = seen[layer]
        untouched, _ = capture_mlps(model, [layer], **inputs)[layer]
        assert torch.equal(x, untouched) == (not before)
        torch.testing.assert_close(y, model.model.layers[layer].mlp(x))
        if before:
            part = MxDModel.from_pretrained(tmp_path / "out", layers=before).eval()
            with part.spliced(model):
                torch.testing.assert_close(x, capture_mlps(model, [layer], **inputs)[layer][0])


def test_a_transcoder_s_layers_are_joined_too(tmp_path):
    decompose(options(tmp_path / "out", layers=[0, 3], method="transcoder", layers_per_pass=1, tokens=512))
    model = MxDModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.directions(3).direction, model.layer(3).decoder)


@pytest.mark.parametrize(
    ("per_layer", "message"),
    [
        ({9: {"num_experts": 8}}, "per_layer sets layer 9, which is not decomposed: layers 4, 0-1 are"),
        ({"first": {"num_experts": 8}}, "per_layer: 'first'"),
        ({0: 8}, "per_layer: 0: 8: write a layer and its options"),
        ({0: {"experts": 8}}, "layer 0 sets 'experts'; it may set num_experts, num_experts_per_tok"),
        ({0: {"method": "mxd"}}, "layer 0 sets 'method'; it may set"),
        ({0: {"num_experts": 0}}, "layer 0: num_experts must be a whole number from 1, got 0"),
        ({0: {"num_experts": "many"}}, "layer 0: num_experts must be a whole number from 1, got 'many'"),
        ({0: {"num_experts_per_tok": 17}}, "num_experts_per_tok"),
    ],
)
def test_settings_of_a_layer_that_are_refused(tmp_path, per_layer, message):
    with pytest.raises(ValueError, match=message):
        decompose(options(tmp_path / "out", per_layer=per_layer))
    assert not (tmp_path / "out").exists()


def test_the_layers_of_one_pass_are_not_pushed(tmp_path):
    with pytest.raises(ValueError, match="push the result with `mxd push`"):
        decompose(options(tmp_path / "out", layers_per_pass=1, training={**TRAINING, "push_to_hub": True}))
    assert not (tmp_path / "out").exists()


def test_settings_of_single_layers():
    model = load_base_model(options("x").model, None, "float32")[0]
    own = {"0": {"num_experts_per_tok": 4}, 1: {"match_transcoder": 8}, 4: {"num_experts": 64, "num_groups_per_tok": 2}}
    config = job.build_config(model, None, options("x", per_layer=own))
    first, second, last = (config.layer(layer) for layer in (0, 1, 4))
    assert (first.num_experts, first.num_experts_per_tok, first.num_groups_per_tok) == (16, 4, None)
    assert (
        second.num_experts
        == job.build_config(model, None, options("x", num_experts=None, match_transcoder=8)).layer(1).num_experts
    )
    assert (last.num_experts, last.num_groups_per_tok) == (64, 2) and last.num_expert_groups == 8


@pytest.mark.parametrize(
    ("site", "chosen", "left"), [("mlp", [0, 1, 2, 3], ""), ("mlp.experts", [1, 2], "layers 0, 3 left out: Qwen2Moe")]
)
def test_all_layers_are_those_that_have_the_mlp(caplog, site, chosen, left):
    sizes = dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"), 8)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 16, "vocab_size": 32}
    config = Qwen2MoeConfig(num_hidden_layers=4, mlp_only_layers=[0, 3], num_experts=4, **sizes, **heads)
    with torch.device("meta"):
        sites = find_mlps(Qwen2MoeForCausalLM(config), site=site)
    assert job.choose_layers(sites, "all") == chosen
    assert left in caplog.text and bool(left) == bool(caplog.text)
