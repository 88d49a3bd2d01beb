"""A decomposition of layers that write to several MLPs, through the commands."""

import json

import pytest
import torch
from commands import SMALL, refused, run
from factories import random_layer

from mxd import DecompositionOptions, MxDModel, demo, load_base_model
from mxd.base.activation_cache import ActivationCache
from mxd.base.base_model import base_skeleton
from mxd.base.capture import capture_layers
from mxd.cli.tables import print_evaluation
from mxd.evaluation import faithfulness, normalised_error
from mxd.experts.logit_effects import Unembedding, find_unembedding
from mxd.hub_cards import build_card
from mxd.interchange import export_transcoder
from mxd.jobs.decompose import build_config
from mxd.jobs.options import PlanOptions
from mxd.jobs.plan import Plan
from mxd.trainers.parameter_budget import transcoder_parameters

FEW = "training: {calibration_tokens: 512, statistics_tokens: 512}\n"
SETTINGS = f"layers_per_pass: 1\nsequential: true\nper_layer: {{3: {{num_output_layers: 1}}}}\n{FEW}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Layers 0 and 1 by one layer, and layer 3 by another, trained one after another: folder, what was printed."""
    root = tmp_path_factory.mktemp("several")
    (root / "run.yaml").write_text(SETTINGS)
    asked = ["--layers", "0,3", "--num-output-layers", "2", "--config", root / "run.yaml", "--output", root / "out"]
    code, output, error = run("decompose", *SMALL, *asked)
    assert code == 0, error
    return root / "out", output


def rows_of(output):
    return {line.split("│")[1].strip(): line for line in output.splitlines() if line.startswith("│")}


def test_results_have_the_errors_of_every_mlp(made, capsys):
    folder, output = made
    mxd, (model, *_) = MxDModel.from_pretrained(folder), load_base_model(demo.MODEL_NAME)
    assert mxd.config.written_layers() == [0, 1, 3]
    batches = [{"input_ids": torch.randint(4, 4096, (3, 16))} for _ in range(2)]
    layers = faithfulness(model, mxd, batches)["layers"]
    captured = [capture_layers(model, mxd.config, **batch)[0] for batch in batches]
    x, y = (torch.cat([pair[i] for pair in captured]) for i in (0, 1))
    with torch.no_grad():
        prediction = mxd.layer(0)(x)
    for found, part in zip(layers["0"]["outputs"], range(0, 384, 192), strict=True):
        errors = normalised_error(prediction[..., part : part + 192], y[..., part : part + 192])
        assert found["nmse"] == pytest.approx(float(errors.mean()), rel=1e-5)
    assert layers["0"]["nmse"] == pytest.approx(float(normalised_error(prediction, y).mean()), rel=1e-5)
    assert "outputs" not in layers["3"]
    recorded, shown = json.loads((folder / "evaluation.json").read_text()), rows_of(output)
    assert [*shown][:4] == ["0", "0 → 0", "0 → 1", "3"]
    for place, row in enumerate(recorded["layers"]["0"]["outputs"]):
        assert f"{row['nmse']:.4f}" in shown[f"0 → {place}"]
    print_evaluation(recorded, recorded)  # as after a fine-tuning
    assert f"{row['nmse']:.4f} → {row['nmse']:.4f}" in rows_of(capsys.readouterr().out)["0 → 1"]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("evaluate", "--tokens", "256", "--ablation", "coefficient", "--output", "-"), '"outputs"'),
        (("experts", "--tokens", "512", "--layer", "0", "--output", "-"), '"promoted"'),
        (("steer", "The President", "--layer", "0", "--expert", "3", "--new-tokens", "2"), "President"),
    ],
)
def test_other_commands(made, command, expected):
    name, *options = command
    code, output, error = run(name, made[0], *options)
    assert code == 0, error
    assert expected in output


def test_the_effects_of_an_expert_are_those_of_all_its_outputs(made):
    model, *_ = load_base_model(demo.MODEL_NAME)
    unembedding = find_unembedding(model, torch.arange(8)[None])
    assert isinstance(unembedding, Unembedding)
    direction = MxDModel.from_pretrained(made[0]).directions(0).direction[:5]
    parts = [unembedding.effects(part) for part in direction.split(192, -1)]
    assert torch.allclose(unembedding.effects(direction), parts[0] + parts[1], atol=1e-5)


def test_the_card_says_what_is_written(made):
    card = build_card(made[0], "ann/several")
    assert "layers 0-1, 3" in card.content and "| 0 → 0-1 | Mixture of Decoders |" in card.content
    assert "| 0 → 1 |" in card.content and "--num-output-layers 2" in card.content
    assert "writes the outputs of the MLPs" in card.content
    assert [tag for tag in card.data.tags if "layer" in tag] == ["mxd-layer-0", "mxd-layer-1", "mxd-layer-3"]


@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
def test_parameters_match_a_transcoder_that_writes_to_as_many(method):
    options = DecompositionOptions(method=method, layers=[1], num_output_layers=3, match_transcoder=16)
    config = build_config(base_skeleton(options.model), None, options)
    wanted = transcoder_parameters(192, 3 * 192, 16 * 192)
    assert 0 <= wanted - config.num_parameters < 192 + 3 * 192 + 1
    assert config.layer(1).output_size == 3 * 192


def test_a_plan_counts_all_mlps(tmp_path):
    one, every = ({"layers": [1], "num_output_layers": count, "num_experts": 300, "flops": 1e12} for count in (1, 3))
    plans = [Plan(PlanOptions(**options)) for options in (one, every)]
    made = [plan.result() for plan in plans]
    assert made[1]["inference"]["mlp_flops_per_token"] == 3 * made[0]["inference"]["mlp_flops_per_token"]
    assert made[1]["flops"]["base"] == plans[0].tokens * plans[0].base.flops_to[3]
    model, *_ = load_base_model(demo.MODEL_NAME)
    cache = ActivationCache.record(tmp_path, model, [1, 2, 3], torch.randint(4, 4096, (2, 16)))
    size = sum(path.stat().st_size for path in tmp_path.glob("layer_*"))
    assert cache.layers == [1, 2, 3] and plans[1].layers[1].cache_bytes * 32 == size


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "0,1", "--num-output-layers", "2"), "write to layer 1"),
        (("--layers", "all", "--num-output-layers", "2"), "name layers that are num_output_layers apart"),
        (("--layers", "4", "--num-output-layers", "2"), "layer 5 is out of range"),
        (("--num-output-layers", "0"), "num-output-layers"),
    ],
)
def test_layers_that_cannot_be_written_are_refused(options, message, monkeypatch, capsys, tmp_path):
    error = refused(monkeypatch, capsys, "decompose", *options, "--output", tmp_path / "out")
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_other_tools_have_no_such_transcoder(tmp_path):
    layer = random_layer("transcoder", num_output_layers=2)
    for tool in ("sae_lens", "circuit_tracer"):
        with pytest.raises(ValueError, match="writes to 2 MLPs"):
            export_transcoder(layer, tmp_path, tool, index=0, model_name="m")
