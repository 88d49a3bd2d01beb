import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of huggingface_hub: no test may reach a network

import datasets
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def library_verbosity():
    """The commands silence transformers and datasets for the process; no other test may see that."""
    yield
    transformers_logging.set_verbosity_warning()
    transformers_logging.enable_progress_bar()
    datasets.enable_progress_bars()
