import json

import pytest
from tiny_models import tiny_config
from transformers import LlamaConfig
from transformers.models.granitemoe import modeling_granitemoe
from typer.testing import CliRunner

from mxd.base.base_model import BaseModelError
from mxd.base.pretrained_weights import mlp_widths
from mxd.cli.main import app
from mxd.jobs.layers import layer_groups, load_skeleton
from mxd.modeling_mxd import MxDConfig, find_mlps


def shown(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["layers", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_embedded_model():
    output = shown()
    assert "model.layers of LlamaForCausalLM" in output
    assert "0-4" in output and "192 → 512 → 192" in output and "gate_proj, up_proj, down_proj" in output


def test_layers_that_are_alike_share_a_line_and_those_without_say_why(tmp_path):
    tiny_config("nemotron_h").save_pretrained(tmp_path)
    output = shown(tmp_path)
    assert output.count("mlp.experts") == 1
    assert (
        "NemotronHBlock has no module that is an MLP, only norm (NemotronHRMSNorm), mixer (NemotronHMamba2Mixer)"
        in (" ".join(output.split()))
    )


def test_every_stack_has_a_table(tmp_path):
    tiny_config("t5").save_pretrained(tmp_path)
    output = shown(tmp_path)
    assert "encoder.block of T5ForConditionalGeneration" in output and "decoder.block of" in output


def test_no_weights_are_read_or_made(tmp_path):
    """A config of 10^12 parameters: the folder holds nothing else, and nothing of that size is made."""
    LlamaConfig(
        hidden_size=2**16, intermediate_size=2**18, num_hidden_layers=8, num_attention_heads=64
    ).save_pretrained(tmp_path)
    model = load_skeleton(str(tmp_path))
    assert all(parameter.is_meta for parameter in model.parameters())
    [group] = layer_groups(model)
    assert group.layers == list(range(8)) and mlp_widths(group.site) == (2**16, 2**18, 2**16)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(BaseModelError, match="cannot build the model"):
        load_skeleton(str(tmp_path / "nothing"))
    for name in ("a.jsonl", "user/a.csv.gz"):
        with pytest.raises(BaseModelError, match=r"is a data file, not a model: pass it with --dataset"):
            load_skeleton(name)


# transformers 5.6 keeps this mixture's experts in two linears of the MLP itself, so there is no module to name.
GRANITE = pytest.param(
    "granitemoe", "", marks=pytest.mark.skipif(not hasattr(modeling_granitemoe, "GraniteMoeExperts"), reason="inline")
)


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("olmoe", ""), ("mixtral", ""), ("qwen3_moe", ""), ("phimoe", ""), ("jamba", ""), ("dbrx", ""),
        ("gpt_oss", ""), GRANITE, ("deepseek_v2", "shared_experts"), ("deepseek_v3", "shared_experts"),
        ("qwen2_moe", "shared_expert"), ("llama4_text", "shared_expert"), ("hunyuan_v1_moe", "shared_mlp"),
    ],
)  # fmt: skip
def test_every_part_of_a_mixture_is_a_site_that_can_be_named(tmp_path, name, shared):
    tiny_config(name).save_pretrained(tmp_path)
    model = load_skeleton(str(tmp_path))
    sites = {group.site.name: group for group in layer_groups(model)}
    named = {"mlp", "mlp.experts", *([f"mlp.{shared}"] if shared else [])}
    assert named == sites.keys()
    for site in named:
        assert site in shown(tmp_path) and find_mlps(model, site=site)
    assert name == "gpt_oss" or sites["mlp.experts"].site.slots != sites["mlp"].site.slots


def test_a_decomposition_is_told_from_a_model(tmp_path):
    MxDConfig(layers=[2], base_model_name_or_path="user/base").save_pretrained(tmp_path)
    with pytest.raises(BaseModelError, match=r"is a decomposition of 'user/base'"):
        load_skeleton(str(tmp_path))


def test_code_of_the_repo_is_neither_run_nor_offered(tmp_path, monkeypatch):
    tiny_config("gpt2").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Config", "AutoModel": "theirs.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(BaseModelError, match="cannot build the model"):
        load_skeleton(str(tmp_path))
    assert not (tmp_path / "ran").exists()
