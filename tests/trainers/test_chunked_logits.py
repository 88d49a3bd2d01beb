import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mxd.evaluation.metrics import CHUNK_ELEMENTS
from mxd.trainers import FinetuningTrainer
from mxd.trainers.chunked_logits import LanguageModelHead, chunked_sum

TOKENS, WIDTH, VOCABULARY = 13, 6, 11


def kl(head):
    return lambda hidden, reference: FinetuningTrainer.kl_loss(hidden @ head.T, reference @ head.T)


def cross_entropy(head):
    return lambda hidden, targets: FinetuningTrainer.cross_entropy_loss(hidden @ head.T, targets)


LOSSES = {"kl": (kl, torch.randn), "cross_entropy": (cross_entropy, None)}


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_have_the_loss_and_the_gradient_of_the_whole(name, chunk, dtype):
    head = torch.randn(VOCABULARY, WIDTH, dtype=dtype)
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    other = torch.randn(TOKENS, WIDTH, dtype=dtype) if name == "kl" else torch.randint(VOCABULARY, (TOKENS,))
    loss = LOSSES[name][0](head)
    whole = loss(hidden, other)
    (expected,) = torch.autograd.grad(3 * whole, hidden)
    total = chunked_sum(loss, chunk, hidden, other)
    (gradient,) = torch.autograd.grad(3 * total, hidden)
    torch.testing.assert_close(total.double(), whole.detach().double(), rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float64 else 4e-2
    torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)
    assert gradient.dtype == dtype


def test_no_tokens_are_a_loss_of_zero():
    hidden = torch.zeros(0, WIDTH, requires_grad=True)
    total = chunked_sum(kl(torch.randn(VOCABULARY, WIDTH)), 4, hidden, torch.zeros(0, WIDTH))
    total.backward()
    assert total.item() == 0
    assert hidden.grad.shape == (0, WIDTH)


def test_without_a_gradient_none_is_made():
    calls = []

    def loss(hidden):
        calls.append(torch.is_grad_enabled())
        return hidden.sum()

    assert chunked_sum(loss, 5, torch.ones(TOKENS, WIDTH)).item() == TOKENS * WIDTH
    assert calls == [False, False, False]


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor that any operation makes has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_tensor_of_all_logits_is_made():
    head = torch.randn(300, WIDTH)
    hidden, reference = torch.randn(64, WIDTH, requires_grad=True), torch.randn(64, WIDTH)
    with LargestTensor() as naive:
        kl(head)(hidden, reference).backward()
    with LargestTensor() as chunked:
        chunked_sum(kl(head), 10, hidden, reference).backward()
    assert naive.elements == 64 * 300
    assert chunked.elements == 10 * 300


SIZES = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
}


def gpt2():
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.5)
    return GPT2LMHeadModel(config), True


def gemma2():
    """Its logits are capped softly, and so tightly that it shows."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5)), True


def opt():
    """It calls the decoder of its base model, not the base model."""
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=48, num_attention_heads=2, init_std=0.5, **sizes)), True


def granite():
    """Its logits are divided by a constant, which the head does not know of."""
    return GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)), False


@pytest.mark.parametrize("make", [gpt2, gemma2, opt, granite])
def test_logits_of_the_hidden_states_are_the_models(make):
    model, splits = make()
    model = model.eval().requires_grad_(False)
    head = LanguageModelHead(model)
    ids = torch.randint(48, (3, 10))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    hidden = head.hidden(model, ids, mask)
    torch.testing.assert_close(head.logits(hidden), model(input_ids=ids, attention_mask=mask).logits)
    assert hidden.shape[-1] == (16 if splits else 48)
    assert head.chunk == CHUNK_ELEMENTS // 48
    assert not any(module._forward_hooks for module in model.modules())
