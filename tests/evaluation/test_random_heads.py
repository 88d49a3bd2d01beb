"""A checkpoint without a head: its layers are measured, and nothing that rests on random predictions."""

import copy
import json
import math

import pytest
import torch
from commands import refused
from factories import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    ElectraConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    RobertaConfig,
    XLNetConfig,
)

from mxd import DecompositionOptions, FrontierOptions, decompose, measure_frontier
from mxd.base.base_model import BaseModelError, load_base_model
from mxd.base.forward import no_predictions, sees_later_tokens
from mxd.cli.tables import print_evaluation, print_frontier
from mxd.hub_cards import build_card
from mxd.jobs.evaluate import evaluate
from mxd.jobs.options import EvaluationOptions

SIZES = {"vocab_size": 400, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
LINES = {"num_key_value_heads": 2}
HEADLESS = {
    "bert": (BertConfig(**SIZES), "cls.predictions"),
    "roberta": (RobertaConfig(**SIZES), "lm_head."),
    "electra": (ElectraConfig(embedding_size=16, **SIZES), "generator_"),
    "llama": (LlamaConfig(**SIZES, **LINES), "lm_head.weight"),
    "mistral": (MistralConfig(**SIZES, **LINES), "lm_head.weight"),
    "gpt_neox": (GPTNeoXConfig(**SIZES), "lm_head.weight"),
}
TEXT = "It was the best of times, it was the worst of times. "
RUN = {"num_experts": 8, "num_experts_per_tok": 2, "tokens": 256, "batch_tokens": 64, "evaluation_tokens": 128,
       "context_length": 16}  # fmt: skip


def save(folder, config, auto=AutoModel):
    torch.manual_seed(0)
    auto.from_config(config).save_pretrained(folder)
    byte_tokenizer([TEXT]).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 200)
    (tmp_path / "heldout.txt").write_text(TEXT[::-1] * 100)
    return {"dataset": [str(tmp_path / "text.txt")], "heldout_dataset": [str(tmp_path / "heldout.txt")]}


@pytest.mark.parametrize(("config", "missing"), HEADLESS.values(), ids=HEADLESS)
def test_missing_heads_are_named(tmp_path, config, missing, caplog):
    model, _, _ = load_base_model(save(tmp_path / "base", config))
    assert f"lacks weights ({missing}" in no_predictions(model) and no_predictions(model) in caplog.text


@pytest.mark.parametrize(
    ("config", "auto"),
    [
        (GPT2Config(vocab_size=400, n_embd=16, n_layer=2, n_head=2), AutoModel),  # its head is the embedding
        (LlamaConfig(**SIZES, **LINES, tie_word_embeddings=True), AutoModel),
        (LlamaConfig(**SIZES, **LINES), AutoModelForCausalLM),
        (BertConfig(**SIZES, is_decoder=True), AutoModelForCausalLM),
    ],
)
def test_a_whole_checkpoint_lacks_nothing(tmp_path, config, auto, caplog):
    assert no_predictions(load_base_model(save(tmp_path / "base", config, auto))[0]) == ""
    assert "lacks" not in caplog.text


BIDIRECTIONAL = {name: HEADLESS[name][0] for name in ("bert", "roberta", "electra")} | {
    "xlnet": XLNetConfig(vocab_size=400, d_model=16, n_layer=2, n_head=2, d_inner=24),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in BIDIRECTIONAL), *((name, "bfloat16") for name in ("bert", "roberta", "electra"))],
)
def test_models_that_see_later_tokens_predict_no_next_one(tmp_path, name, dtype, caplog):
    config = copy.deepcopy(BIDIRECTIONAL[name])
    config.initializer_range = 0.5  # with weights near zero, rounding to bfloat16 hides other tokens
    model, _, _ = load_base_model(save(tmp_path / "base", config, AutoModelForCausalLM), dtype=dtype)
    assert "sees the tokens that come after the one it predicts" in no_predictions(model)
    assert no_predictions(model) in caplog.text and not model.training


CAUSAL = ("gpt2", "llama", "mistral", "mixtral", "gpt_neox", "mamba", "bloom", "olmoe", "gpt_oss", "qwen3_moe")


@pytest.mark.parametrize("model_type", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_models_do_not_see_later_tokens(model_type, dtype):
    assert not sees_later_tokens(tiny_model(model_type).to(dtype))


def test_a_masked_language_model_gets_no_cross_entropy(tmp_path, text):
    base = save(tmp_path / "base", HEADLESS["bert"][0], AutoModelForCausalLM)
    results = decompose(DecompositionOptions(model=base, output=str(tmp_path / "out"), **RUN, **text))
    check_no_predictions(results)
    assert "sees the tokens" in results["settings"]["no_predictions"]
    assert (
        "sees the tokens that come after the one it predicts: there are no figures" in build_card(tmp_path / "out").text
    )


@pytest.mark.parametrize(
    "lost", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_checkpoint_without_weights_of_the_layers_is_refused(tmp_path, lost):
    folder = save(tmp_path / "base", HEADLESS["llama"][0], AutoModelForCausalLM)
    file = tmp_path / "base" / "model.safetensors"
    weights = load_file(file)
    del weights[lost]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=f"lacks 1 weights of the layers and embeddings.*{lost}"):
        load_base_model(folder)


def check_no_predictions(results):
    assert all(value is None or value == [None, None] for value in results["cross_entropy"].values())
    assert results["kl"] is results["top1_agreement"] is None
    for row in results["layers"].values():
        assert 0 < row["nmse"] < 2 and math.isfinite(row["l0"])


def test_the_layers_alone_are_measured(tmp_path, text, capsys, monkeypatch):
    config, missing = HEADLESS["bert"]
    base, out = save(tmp_path / "base", config), str(tmp_path / "out")
    results = decompose(DecompositionOptions(model=base, output=out, **RUN, **text))
    check_no_predictions(results)
    assert f"lacks weights ({missing}" in results["settings"]["no_predictions"]
    capsys.readouterr()
    print_evaluation(results)
    shown = capsys.readouterr().out
    assert "NMSE" in shown and "cross-entropy" not in shown and "No figures of its predictions" in shown
    card = build_card(out)
    assert "there are no figures of its predictions" in card.text and "cross_entropy_rise" not in str(card.data)
    how = {"decomposition": out, "dataset": text["heldout_dataset"], "context_length": 16, "tokens": 128}
    check_no_predictions(evaluate(EvaluationOptions(**how), progress=False))
    asked = [out, "--dataset", *how["dataset"], "--context-length", "16"]
    fine = ["--heldout-dataset", *text["dataset"], "--output", tmp_path / "fine"]
    for command, more in (("evaluate", ["--ablation", "coefficient"]), ("finetune", fine)):
        error = refused(monkeypatch, capsys, command, *asked, *more)
        assert "needs the model's predictions, but the checkpoint of" in error
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["kl"] is None


def test_a_frontier_has_the_layers_figures(tmp_path, text, capsys):
    run = {name: value for name, value in RUN.items() if name not in ("num_experts", "num_experts_per_tok")}
    results = measure_frontier(
        FrontierOptions(
            model=save(tmp_path / "base", HEADLESS["bert"][0]), output=str(tmp_path / "out"), methods=["mxd"],
            num_experts_per_tok=[2], match_transcoder=2, **run, **text,
        ),
        progress=False,
    )  # fmt: skip
    assert results["untouched"] is None and results["points"][0]["layers"]["1"]["nmse"] < 2
    assert (tmp_path / "out" / "frontier.png").is_file()
    print_frontier(results)
    assert "mxd" in capsys.readouterr().out
