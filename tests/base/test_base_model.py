import pytest
from transformers import CONFIG_MAPPING

from mxd import demo
from mxd.base.base_model import BaseModelError, load_base_model

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma", "opt", "mamba", "xglm", "ctrl"])
def test_a_folder_without_a_tokenizer(tmp_path, model_type):
    """transformers raises errors of several classes, or makes a tokenizer of special tokens alone."""
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path)
    with pytest.raises(BaseModelError) as refusal:
        load_base_model(str(tmp_path))
    message = str(refusal.value)
    assert f"'{tmp_path}' has no tokenizer that loads" in message and "add tokenizer.json" in message
    assert not message.endswith(":") and ", )" not in message


def test_the_embedded_tokenizer_is_no_empty_one():
    assert len(load_base_model(demo.MODEL_NAME)[1]) > 1000
