"""One repo, two entry points: AutoModel loads the decomposition, AutoModelForCausalLM the spliced base model."""

import copy
import json
import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
import warm_process
from doors_cases import IDS, decomposition, logits
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from mxd import build_card, modeling_mxd
from mxd.modeling_mxd import MxDConfig, MxDForCausalLM, MxDModel, SplicedLanguageModel, SurgeryError
from mxd.modeling_mxd.configuration_mxd import DEMO_MODEL
from mxd.modeling_mxd.spliced_language_model import make_spliced


def test_both_doors(repo, spliced, expected, tiny_llama):
    mxd = AutoModel.from_pretrained(repo)
    assert type(mxd) is MxDModel
    assert isinstance(spliced, LlamaForCausalLM)
    assert isinstance(spliced, SplicedLanguageModel)
    assert type(spliced).__name__ == "LlamaForCausalLM"
    assert torch.equal(logits(spliced), expected)
    assert not torch.equal(expected, logits(tiny_llama))
    assert not spliced.training


def test_without_the_library(repo_with_tokenizer, expected, tmp_path):
    repo = repo_with_tokenizer
    snippet = build_card(repo).text.partition("```python\n")[2].partition("```")[0]  # loads the folder "repo"
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mxd":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import torch
from transformers import AutoModel, AutoModelForCausalLM, pipeline
repo = {str(repo)!r}
ids = torch.arange(2, 22).reshape(2, 10)
lm = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True)
mxd = AutoModel.from_pretrained(repo, trust_remote_code=True)
assert "transformers_modules" in type(mxd).__module__, type(mxd).__module__
again = {str(tmp_path / "again")!r}
lm.save_pretrained(again)
torch.save([lm(ids).logits, AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(ids).logits,
            lm.generate(ids, max_new_tokens=3, do_sample=False)], {str(tmp_path / "out.pt")!r})
write = pipeline("text-generation", repo, trust_remote_code=True)
(written,) = write("word2 word3", max_new_tokens=3, min_new_tokens=3, do_sample=False, return_tensors=True)
assert len(written["generated_token_ids"]) == 5, written
import builtins, io, logging
builtins.input = lambda *_: sys.exit("a prompt")
said = io.StringIO()
logging.getLogger("transformers").addHandler(logging.StreamHandler(said))
{snippet}
assert tokenizer("word3")["input_ids"] and not said.getvalue(), said.getvalue()
assert indices.shape[-1] == 4
""")
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = warm_process.run(script, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second, tokens = torch.load(tmp_path / "out.pt")
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert tokens.shape == (2, 13)
    saved, loaded = (tmp_path / name / "config.json" for name in ("again", "repo"))
    assert json.loads(saved.read_text())["auto_map"] == json.loads(loaded.read_text())["auto_map"]


def test_older_versions_of_transformers_find_all_code():
    # Run for real by benchmarks/compatibility.py: 4.x copies only what the entry file itself imports, and has the
    # config's class by its first name.
    folder = Path(modeling_mxd.__file__).parent
    sources = {path.stem: path.read_text() for path in folder.glob("*.py")}
    imported = set(re.findall(r"^from \.(\w+) import", sources["modeling_mxd"], re.MULTILINE))
    assert imported == sources.keys() - {"__init__", "modeling_mxd"}
    assert not [name for name, source in sources.items() if "PreTrainedConfig" in source]


def test_only_the_decomposition_is_saved_and_byte_for_byte(repo, spliced, tmp_path):
    spliced.save_pretrained(tmp_path / "again")
    files = sorted(path.name for path in repo.glob("*.safetensors"))
    assert len(files) == 2  # a shard for each layer
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (repo / name).read_bytes()
    assert MxDConfig.from_pretrained(tmp_path / "again").to_dict() == MxDConfig.from_pretrained(repo).to_dict()


def test_copies(spliced, expected):
    for other in (copy.deepcopy(spliced), pickle.loads(pickle.dumps(spliced))):
        assert torch.equal(logits(other), expected)
        other.decomposition.layer(0).output_bias.data.add_(1)
        assert not torch.equal(logits(other), expected)  # one and the same layer inside the copy
        assert torch.equal(logits(spliced), expected)


def test_copies_are_unspliced_alone(spliced, expected, tiny_llama):
    for other in (copy.deepcopy(spliced), pickle.loads(pickle.dumps(spliced))):
        base = other.unsplice()
        assert type(base) is LlamaForCausalLM
        assert torch.equal(logits(base), logits(tiny_llama))
        assert torch.equal(logits(spliced), expected)


def test_config_and_generation_config_stay_the_bases(repo, spliced, tiny_llama, base_folder, tmp_path):
    spliced.config.save_pretrained(tmp_path / "config")
    assert (tmp_path / "config" / "config.json").read_text() == (base_folder / "config.json").read_text()
    assert spliced.generation_config.eos_token_id == tiny_llama.config.eos_token_id
    assert type(AutoConfig.from_pretrained(repo)) is MxDConfig
    assert "generation_config.json" not in {path.name for path in repo.iterdir()}


def test_unsplice(spliced, tiny_llama, tmp_path):
    base = spliced.unsplice()
    assert base is spliced
    assert type(base) is LlamaForCausalLM
    assert torch.equal(logits(base), logits(tiny_llama))
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not hasattr(base, "decomposition")
    base.save_pretrained(tmp_path / "whole")
    assert LlamaForCausalLM.from_pretrained(tmp_path / "whole").num_parameters() == tiny_llama.num_parameters()


def test_unsplice_that_is_refused_changes_nothing(spliced, expected):
    layer, place = spliced.decomposition.layer(0), spliced.model.layers[0]
    place.mlp = nn.Identity()
    with pytest.raises(SurgeryError, match="MLP of layer 0 was changed"):
        spliced.unsplice()
    place.mlp = layer
    assert torch.equal(logits(spliced), expected)
    assert type(spliced.unsplice()) is LlamaForCausalLM


def test_unsplice_after_a_change_of_dtype(spliced, tiny_llama):
    base = spliced.to(torch.bfloat16).unsplice()
    assert {parameter.dtype for parameter in base.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(base), logits(tiny_llama.to(torch.bfloat16)))


def test_some_layers(repo, tmp_path):
    for file in repo.glob("model-00001*"):  # layer 0's: must not be read
        file.unlink()
    mxd = MxDModel.from_pretrained(repo, layers=[2])
    whole = MxDConfig.from_pretrained(repo)
    assert mxd.config.layers == [2]
    assert mxd.config.layer(2) == whole.layer(2)
    shard = load_file(next(repo.glob("model-00002*")))
    assert all(torch.equal(value, shard[key]) for key, value in mxd.state_dict().items())
    mxd.save_pretrained(tmp_path / "one")
    assert MxDModel.from_pretrained(tmp_path / "one").config.layers == [2]
    lm = AutoModelForCausalLM.from_pretrained(repo, layers=[2])
    assert lm.decomposition.config.layers == [2]
    with pytest.raises(ValueError, match="layers names layer 2 more than once"):
        MxDModel.from_pretrained(repo, layers=[2, 2])
    for door in (AutoModel, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"layer 9 is not in the decomposition .*, which has layers \[0, 2\]"):
            door.from_pretrained(repo, layers=[2, 9])


def test_layers_of_an_unsharded_repo(repo, tmp_path):
    MxDModel.from_pretrained(repo).save_pretrained(tmp_path / "one-file", max_shard_size="1GB")
    assert MxDModel.from_pretrained(tmp_path / "one-file", layers=[2]).config.layers == [2]


def test_decompositions_of_several_layers_together(repo, base_folder, tiny_llama, expected):
    first, second = (MxDModel.from_pretrained(repo, layers=[layer]) for layer in (0, 2))
    before = logits(tiny_llama)
    with first.spliced(tiny_llama), second.spliced(tiny_llama):
        assert torch.equal(logits(tiny_llama), expected)
    assert torch.equal(logits(tiny_llama), before)
    replaced = first.splice(tiny_llama) + second.splice(tiny_llama)
    assert torch.equal(logits(tiny_llama), expected)
    for replacement in replaced:  # of different layers, so in any order
        replacement.restore()
    assert torch.equal(logits(tiny_llama), before)


def test_two_decompositions_at_once(repo, base_folder, tiny_llama):
    first = AutoModelForCausalLM.from_pretrained(repo, layers=[0])
    other = decomposition(base_folder, tiny_llama, layers=(1,))
    before = logits(first)
    with other.spliced(first):
        assert not torch.equal(logits(first), before)
    assert torch.equal(logits(first), before)
    with pytest.raises(SurgeryError, match="already replaced"):
        decomposition(base_folder, tiny_llama, layers=(1, 0)).splice(first)
    assert torch.equal(logits(first), before)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("base_model_type", "gpt2", "base_model_type 'gpt2', this model's is 'llama'"),
        ("base_hidden_act", "gelu", "base_hidden_act 'gelu', this model's config names 'silu'"),
        ("hidden_size", 12, "maps 16 to 16 dimensions, the decomposition's layer 12 to 16"),
    ],
)
def test_another_base_is_refused(base_folder, tiny_llama, field, value, message):
    mxd = MxDModel(
        MxDConfig(
            **{**decomposition(base_folder, tiny_llama).config.to_diff_dict(), field: value, "layer_overrides": {}}
        )
    )
    before = logits(tiny_llama)
    with pytest.raises(SurgeryError, match=message):
        mxd.splice(tiny_llama)
    assert torch.equal(logits(tiny_llama), before)


def test_another_commit_is_warned_about(base_folder, tiny_llama, caplog, monkeypatch):
    mxd = decomposition(base_folder, tiny_llama)
    mxd.config.base_model_revision, tiny_llama.config._commit_hash = "a" * 40, "b" * 40
    warned = []
    monkeypatch.setattr("mxd.modeling_mxd.modeling_mxd.logger.warning", warned.append)
    with mxd.spliced(tiny_llama):
        pass
    assert "a" * 40 in warned[0]
    assert "b" * 40 in warned[0]


def test_base_weights_are_frozen_and_not_saved(spliced, expected, tmp_path):
    trainable = {name for name, parameter in spliced.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(name.startswith(("model.layers.0.mlp.", "model.layers.2.mlp.")) for name in trainable)
    spliced.lm_head.weight.data += 0.01
    spliced.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


@pytest.mark.parametrize("mode", [True, False])
def test_unsplice_keeps_the_mode(spliced, mode):
    assert {module.training for module in spliced.train(mode).unsplice().modules()} == {mode}


def test_what_was_frozen_before_stays_frozen(base_folder, tiny_llama):
    tiny_llama.model.embed_tokens.requires_grad_(False)
    before = {name for name, parameter in tiny_llama.named_parameters() if parameter.requires_grad}
    model = make_spliced(tiny_llama, decomposition(base_folder, tiny_llama), "mine").unsplice()
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before


def test_trainer_trains_saves_and_resumes(spliced, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS.repeat(8, 1)]

    def train(model, steps, **kwargs):
        arguments = TrainingArguments(
            str(tmp_path / "run"), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to="none",
            use_cpu=True, disable_tqdm=True, learning_rate=1e-2, gradient_checkpointing=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train(**kwargs)
        return logits(model.eval())

    other = copy.deepcopy(spliced)
    before = logits(spliced)
    whole = train(spliced, 4)
    assert not torch.equal(whole, before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")), whole)
    resumed = train(other, 4, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.allclose(resumed, whole, atol=1e-6)


def test_peft(repo, spliced, tmp_path):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    model = get_peft_model(
        spliced, LoraConfig(target_modules=["q_proj", "gate", "encoder"], r=2, task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(repo)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    want = logits(model)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), want)


def test_an_adapter_is_not_saved_as_a_decomposition(spliced, tiny_llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    get_peft_model(spliced, LoraConfig(target_modules=["gate"], r=2))
    with pytest.raises(ValueError, match=r"gate\.base_layer"):
        spliced.save_pretrained(tmp_path / "adapted")
    assert not list(tmp_path.glob("adapted/*.safetensors"))
    assert torch.equal(logits(spliced.unsplice()), logits(tiny_llama))


def test_an_adapter_merged_into_the_decomposition_is_saved(spliced, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["gate", "encoder"], r=2, init_lora_weights=False)
    merged = get_peft_model(spliced, config).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_a_base_that_is_a_decomposition_is_refused(repo):
    with pytest.raises(ValueError, match="is a decomposition itself"):
        AutoModelForCausalLM.from_pretrained(repo, base_model_name_or_path=str(repo))


@pytest.mark.parametrize("name", ["nobody/nothing", "../nothing", "a" * 4000])
def test_a_base_that_is_nowhere(repo, name):
    with pytest.raises(OSError, match=r"base model '.*' cannot be had.*pass base_model_name_or_path="):
        AutoModelForCausalLM.from_pretrained(repo, base_model_name_or_path=name)


def test_a_base_that_is_not_named_is_refused(repo):
    config = json.loads((repo / "config.json").read_text())
    (repo / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        AutoModelForCausalLM.from_pretrained(repo)


def test_the_base_that_ships_with_the_library_is_found_in_it(repo, monkeypatch):
    with pytest.raises(SurgeryError, match="maps 192 to 192 dimensions"):
        AutoModelForCausalLM.from_pretrained(repo, base_model_name_or_path=DEMO_MODEL)
    monkeypatch.setitem(sys.modules, "mxd.demo", None)
    with pytest.raises(ValueError, match="ships with mxd: install mxd, or pass base_model_name_or_path="):
        AutoModelForCausalLM.from_pretrained(repo, base_model_name_or_path=DEMO_MODEL)


def test_no_instances(repo):
    with pytest.raises(TypeError, match="has no instances"):
        MxDForCausalLM(AutoConfig.from_pretrained(repo))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_are_refused(repo, change):
    file = next(repo.glob("model-00001*"))
    weights, index = load_file(file), json.loads((repo / "model.safetensors.index.json").read_text())
    name = "layers.0.output_bias"
    if change == "missing":
        del weights[name], index["weight_map"][name]
    elif change == "extra":
        weights["layers.0.surprise"] = torch.zeros(3)
        index["weight_map"]["layers.0.surprise"] = file.name
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, file, metadata={"format": "pt"})
    (repo / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, RuntimeError), match=r"layers\.0\.(output_bias|surprise)|size mismatch|mismatch"):
        MxDModel.from_pretrained(repo)


@pytest.mark.parametrize("file", ["../elsewhere.safetensors", "/etc/passwd", "model.bin", 7])
def test_an_index_that_points_elsewhere_is_refused(repo, file):
    path = repo / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["layers.0.output_bias"] = file
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"weight_map|outside of the repo"):
        MxDModel.from_pretrained(repo, layers=[0])


def test_pickles_are_not_read(repo):
    torch.save({}, repo / "pytorch_model.bin")
    for file in (*repo.glob("*.safetensors"), repo / "model.safetensors.index.json"):
        Path(file).unlink()
    with pytest.raises(OSError, match="safetensors"):
        MxDModel.from_pretrained(repo)
