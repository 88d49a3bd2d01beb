"""Build the small models, decompositions and tokenizers that tests start from; keywords override what they are made of.

Nothing here is read from a file or a network, and the same seed gives the same weights.
"""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mxd.modeling_mxd import MxDConfig, MxDLayerConfig, MxDModel, make_layer

SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_experts": 24, "num_experts_per_tok": 4}
GLU = {"encoder_type": "glu", "hidden_act": "silu"}  # as the tiny Llama's MLPs
FORMS = {
    "mxd": {"method": "mxd"},
    "mxd-glu": {"method": "mxd", **GLU},
    "transcoder": {"method": "transcoder"},
    "skip_transcoder": {"method": "skip_transcoder"},
}


def make_tiny_llama(**changes):
    """A language model of three layers, whose weights are the same each time."""
    torch.manual_seed(0)
    values = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0,
        "eos_token_id": 1, "initializer_range": 0.3, **changes,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**values)).eval()


def randomise(module, std=0.3, buffers=False):
    """Fill a module with normal numbers: the init has zeros, which hide mistakes and pass no gradient on."""
    for tensor in (*module.parameters(), *(module.buffers() if buffers else ())):
        nn.init.normal_(tensor, std=std)
    return module


def mxd_config(layers=(1,), **changes):
    """The config of a decomposition that fits the tiny Llama."""
    return MxDConfig(layers=list(layers), **{**SIZES, **changes})


def mxd_model(layers=(1,), **changes):
    """A decomposition that fits the tiny Llama, as it is before training."""
    return MxDModel(mxd_config(layers, **changes))


def random_mxd_model(layers=(1,), std=0.3, buffers=False, **changes):
    """A decomposition that fits the tiny Llama, without a zero anywhere."""
    return randomise(mxd_model(layers, **changes), std, buffers)


def with_directions(model, source="auxiliary transcoder"):
    """Give a decomposition random directions."""
    layers = {index: model.config.layer(index) for index in model.config.layers}
    maxima = {index: torch.rand(layer.num_experts) + 0.5 for index, layer in layers.items()}
    directions = {
        index: torch.randn(layer.num_experts, layer.output_size)
        for index, layer in layers.items()
        if layer.method == "mxd"
    }
    model.set_directions(maxima, directions, source)
    return model


def random_layer(form="mxd", dtype=torch.float32, std=0.5, **changes):
    """One layer, 16 to 12 dimensions, without a zero anywhere."""
    sizes = {**SIZES, "output_size": 12, "intermediate_size": 20}
    return randomise(make_layer(MxDLayerConfig(**{**sizes, **FORMS[form], **changes})), std).to(dtype)


def word_tokenizer(words=64, **special):
    """A tokenizer with a token for each of the words "word0", "word1" …; special tokens come first."""
    names = list(dict.fromkeys(special.values()))
    vocabulary = [*names, *(f"word{number}" for number in range(words - len(names)))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_tokenizer(texts, **special):
    """A byte-level tokenizer of 400 tokens trained on `texts`; ids 0 and 1 are "<s>" and "</s>"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)
