import json
import math

import pytest
import torch
from commands import refused, run
from factories import make_tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from mxd.base.activation_cache import ActivationCache
from mxd.jobs import plan as job
from mxd.jobs.decompose import build_config
from mxd.jobs.options import DecompositionOptions, PlanOptions
from mxd.jobs.run_folder import write_run
from mxd.modeling_mxd import MxDModel
from mxd.trainers.auxiliary_transcoder import AuxiliaryTranscoders

GIVEN = {"flops": 1e12}


def planned(**options):
    return job.plan(PlanOptions(**{**GIVEN, **options}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configs of models that no machine here could hold, without weights."""
    root = tmp_path_factory.mktemp("configs")
    big = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    LlamaConfig(num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False, **big).save_pretrained(
        root / "llama-70b"
    )
    GPT2Config(n_embd=64, n_layer=3, n_head=2, vocab_size=100, n_positions=256).save_pretrained(root / "gpt2")
    MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
        num_attention_heads=2, num_key_value_heads=2, vocab_size=100,
    ).save_pretrained(root / "mixtral")  # fmt: skip
    return root


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [1]},
        {"layers": [0, 3], "method": "transcoder", "num_experts": 96},
        {"layers": [2], "method": "skip_transcoder"},
        {"layers": [1, 2], "auxiliary_weight": 0.0, "intermediate_size": 64},
        {"layers": [4], "num_groups_per_tok": 4, "num_experts": 400},
    ],
)
def test_parameters_and_files_are_those_of_the_model_itself(options, tmp_path):
    made = planned(**options)
    chosen = DecompositionOptions(**options)
    config = build_config(job.base_skeleton(chosen.model), None, chosen)
    with torch.device("meta"):
        model = MxDModel(config)
    assert made["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    auxiliary = AuxiliaryTranscoders(config, chosen.auxiliary_weight > 0)
    counted = sum(row["auxiliary_parameters"] for row in made["layers"].values())
    assert counted == sum(parameter.numel() for parameter in auxiliary.parameters())
    directions = sum(v.numel() + len(v) for v in auxiliary.decoders().values())
    if directions or options.get("method", "mxd") != "mxd":
        weights = sum(tensor.numel() for tensor in model.state_dict().values())
        assert made["disk"]["result"] == 4 * (weights + directions)


@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
def test_flops_are_those_that_torch_counts(method):
    """Of dense products: torch does not count sums of rows, which the plan adds."""
    options = PlanOptions(layers=[1], method=method, num_experts=200, auxiliary_weight=0.0, **GIVEN)
    made = job.Plan(options)
    config, base = made.configs[1], job.base_skeleton(options.model)
    rows = 2 * config.num_experts_per_tok * config.output_size
    with torch.device("meta"):
        model, x = MxDModel(made.config), torch.empty(1, 128, config.hidden_size)
        ids = torch.zeros(1, 128, dtype=torch.int64)
    gate = 2 * config.num_experts * config.hidden_size
    with FlopCounterMode(display=False) as counted:
        model.layer(1)(x)
    assert made.layers[1].inference_flops - rows - gate == counted.get_total_flops() / 128  # the gate is our operator
    with FlopCounterMode(display=False) as counted:
        base(ids)
    assert made.base.flops == pytest.approx(counted.get_total_flops() / 128, rel=0.05)


def test_the_cache_is_as_large_as_planned(tmp_path):
    tokens = 16 * 128
    made = planned(layers=[1, 3], tokens=tokens, batch_tokens=128)
    widths = [(192, 192)] * 2
    assert made["disk"]["activation_cache"] == sum(2 * tokens * (i + o) for i, o in widths)
    model, rows = make_tiny_llama(), torch.randint(64, (4, 8))
    ActivationCache.record(tmp_path / "cache", model, [1], rows)
    files = sum(path.stat().st_size for path in (tmp_path / "cache").glob("layer_*.bin"))
    assert files == 2 * rows.numel() * 32


def test_a_model_that_fits_nowhere_is_planned_from_its_config(folder):
    made = planned(model=str(folder / "llama-70b"), layers=list(range(80)), dtype="bfloat16", devices=8, tokens=10**9)
    assert made["base"]["parameters"] == 70_553_706_496
    every, passes, spread, split = made["strategies"]
    assert [row["base_passes"] for row in (every, passes, spread, split)] == [1, 80, 8, 1]
    assert every["memory_bytes"] > split["memory_bytes"] > made["base"]["bytes"]
    # Passes end with the evaluation of all layers, whose weights are in memory together.
    assert every["memory_bytes"] > passes["memory_bytes"] > 2 * 70_553_706_496 + 4 * made["parameters"]
    assert every["memory_bytes"] > spread["memory_bytes"] > made["base"]["bytes"]
    assert passes["training_seconds"] > every["training_seconds"] > 0
    assert made["disk"]["activation_cache"] == made["settings"]["tokens"] * 80 * 4 * 8192


@pytest.mark.parametrize(("model", "layers"), [("gpt2", [0, 2]), ("mixtral", [1])])
def test_other_architectures_are_planned(folder, model, layers):
    made = planned(model=str(folder / model), layers=layers, context_length=64)
    assert list(made["layers"]) == list(map(str, layers))
    assert 0 < made["inference"]["against_mlp"] < 100 and made["inference"]["against_model"] > 1


def test_half_the_experts_of_a_mixture_make_half_its_flops(folder):
    options = PlanOptions(model=str(folder / "mixtral"), layers=[1], **GIVEN)
    made = job.Plan(options)
    assert made.layers[1].mlp_flops == 2 * 3 * 64 * 96 * 2
    assert made.base.flops < 2 * made.base.parameters


@pytest.mark.parametrize(
    "change",
    [{"tokens": 2 * 10**6}, {"layers": [0, 1]}, {"num_experts": 4096}, {"devices": 1, "flops": 5e11}],
    ids=["tokens", "layers", "experts", "slower device"],
)
def test_more_work_takes_longer(change):
    common = {"layers": [1], "num_experts": 512, "tokens": 10**6}
    seconds = [sum(planned(**options)["seconds"].values()) for options in (common, {**common, **change})]
    assert seconds[1] > 1.05 * seconds[0]


def test_layers_all_and_settings_of_single_layers(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("per_layer: {1: {num_experts: 200}}\nlayers_per_pass: 2\nnum_experts: 100\nflops: 1.0e+12")
    code, output, error = run("plan", "--layers", "all", "--config", config, "--output", "-")
    assert code == 0, error
    made = json.loads(output)
    assert [row["num_experts"] for row in made["layers"].values()] == [100, 200, 100, 100, 100]
    assert [row["strategy"] for row in made["strategies"]] == ["all layers on each device", "2 layers a pass"]
    assert made["strategies"][1]["base_passes"] == 3


def test_memory_grows_with_what_it_holds():
    def memory(**options):
        return planned(**{"layers": [0, 1], "num_experts": 2048, "evaluation_tokens": 128, **options})["strategies"][0]

    least = memory()["memory_bytes"]
    assert memory(dtype="bfloat16")["memory_bytes"] < least
    for more in ({"layers": [0, 1, 2]}, {"num_experts": 4096}, {"batch_tokens": 8192}, {"devices": 2}):
        assert memory(**more)["memory_bytes"] > least or "devices" in more
    assert memory(auxiliary_weight=0.0)["memory_bytes"] < least
    assert math.isclose(sum(memory()["memory"].values()), least)


def test_a_run_is_planned_by_its_own_file(tmp_path):
    options = DecompositionOptions(layers=[1, 2], num_experts=300, tokens=4096, training={"calibration_tokens": 256})
    write_run(tmp_path, "decompose", options)
    code, output, error = run("plan", "--config", tmp_path / "run.yaml", "--flops", "1e12", "--output", "-")
    assert code == 0, error
    made = json.loads(output)
    assert list(made["layers"]) == ["1", "2"] and made["settings"]["tokens"] == 4096
    assert made == json.loads(json.dumps(planned(layers=[1, 2], num_experts=300, tokens=4096,
                                                 training={"calibration_tokens": 256})))  # fmt: skip


def test_the_tables_show_it(capsys):
    code, output, error = run("plan", "--layers", "1-3", "--devices", "2", "--flops", "1e12", "--tokens", "1M")
    assert code == 0, error
    for shown in (
        "all layers on each device",
        "1 layer a pass",
        "layers spread over",
        "experts split over",
        "activation cache",
        "× model",
    ):
        assert shown in output, shown


def test_rates_are_measured_where_none_is_given(monkeypatch):
    monkeypatch.setattr(job, "measure_rates", lambda *_: job.Rates(1e9, 2e9, 3e9))
    settings = job.plan(PlanOptions(layers=[1]))["settings"]
    assert (settings["base"], settings["layers"], settings["bandwidth"]) == (1e9, 2e9, 3e9)


def test_measured_rates_are_those_of_the_clock():
    base, ticks = job.Plan(PlanOptions(layers=[1], **GIVEN)).base, iter(range(100))
    rates = job.measure_rates(base, torch.float32, torch.bfloat16, lambda: next(ticks))
    flops = 2 * 2048 * 192 * 512
    assert rates == (flops, flops, 2 * 4 * 2**24)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/model"], "cannot load the model"),
        (["--layers", "9"], "9"),
        (["-k", "99999"], "num_experts_per_tok"),
        (["--context-length", "1M"], "no whole number"),
        (["--context-length", "1024"], "fewer than a row"),
        (["--flops", "0"], "less than 1"),
        (["--devices", "0"], "less than 1"),
    ],
)
def test_what_decompose_refuses_is_refused_before_rates_are_measured(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(job, "measure_rates", pytest.fail)
    assert message in " ".join(refused(monkeypatch, capsys, "plan", *arguments).replace("│", " ").split())
