"""Generation with the spliced model: it equals that of base and decomposition put together by hand, in every way that
transformers generates."""

import copy

import pytest
import torch
from doors_cases import IDS, logits
from transformers import AutoTokenizer, pipeline

WAYS = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beam": {"num_beams": 3},
    "sample": {"do_sample": True, "top_k": 20, "temperature": 0.8},
    "beam sample": {"do_sample": True, "num_beams": 2},
}
ROUTED = {"num_expert_groups": 6, "num_groups_per_tok": 2}
exact_or_routed = pytest.mark.parametrize("repo", [{}, ROUTED], ids=["exact", "routed"], indirect=True)


def generate(model, ids=IDS, **how):
    torch.manual_seed(1)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **how}
    return model.generate(ids, **settings)


@pytest.mark.parametrize("way", WAYS)
def test_generation_equals_that_of_a_splice_by_hand(spliced, by_hand, tiny_llama, way):
    tokens = generate(spliced, **WAYS[way])
    assert tokens.shape == (2, 15)
    assert torch.equal(tokens, generate(by_hand, **WAYS[way]))
    assert not torch.equal(tokens, generate(tiny_llama, **WAYS[way]))  # the untouched base says something else


@exact_or_routed
def test_the_cache_changes_nothing(spliced):
    assert torch.equal(generate(spliced), generate(spliced, use_cache=False))
    assert torch.equal(generate(spliced), generate(spliced, cache_implementation="static"))


@pytest.mark.parametrize("draft", ["itself", "the base"])
def test_assisted_generation_equals_greedy(spliced, tiny_llama, draft):
    assistant = {"itself": copy.deepcopy(spliced), "the base": tiny_llama}[draft]
    how = {"min_new_tokens": None}  # which transformers 5.0 does not take together with an assistant
    assisted = generate(spliced, IDS[:1], assistant_model=assistant, **how)
    assert torch.equal(assisted, generate(spliced, IDS[:1], **how))
    assert assisted.shape[1] > 11


def test_a_spliced_model_drafts_for_its_base(spliced, tiny_llama):
    assisted = generate(tiny_llama, IDS[:1], assistant_model=spliced, min_new_tokens=None)
    assert torch.equal(assisted, generate(tiny_llama, IDS[:1], min_new_tokens=None))


def test_rows_of_a_padded_batch_are_those_without_padding(spliced):
    long, short, padding = IDS[:1], IDS[1:, :4], torch.zeros(1, 6, dtype=torch.long)
    batch = torch.cat([long, torch.cat([padding, short], dim=1)])
    mask = torch.ones_like(batch)
    mask[1, :6] = 0
    tokens = generate(spliced, batch, attention_mask=mask)
    assert torch.equal(tokens[:1], generate(spliced, long))
    assert torch.equal(tokens[1:, 6:], generate(spliced, short))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = logits(spliced, batch, attention_mask=mask, position_ids=positions)
    assert torch.allclose(padded[:1], logits(spliced, long), atol=1e-5)
    assert torch.allclose(padded[1:, 6:], logits(spliced, short), atol=1e-5)


def test_pipeline(repo_with_tokenizer, spliced):
    write = pipeline("text-generation", str(repo_with_tokenizer), trust_remote_code=True)
    assert write.model.decomposition.config.layers == [0, 2]
    how = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    written = write("word1 word2 word3", return_tensors=True, **how)[0]["generated_token_ids"]
    ids = AutoTokenizer.from_pretrained(repo_with_tokenizer)("word1 word2 word3", return_tensors="pt").input_ids
    assert written == generate(spliced, ids, **how)[0].tolist()
    assert len(written) == 7


def test_pipeline_arguments_reach_both(repo_with_tokenizer):
    write = pipeline(
        "text-generation", str(repo_with_tokenizer), dtype="bfloat16", device_map="cpu",
        model_kwargs={"layers": [2], "attn_implementation": "eager"},
    )  # fmt: skip
    assert write.model.decomposition.config.layers == [2]
    assert write.model.dtype == write.model.decomposition.dtype == torch.bfloat16
    assert write.model.config._attn_implementation == "eager"


@pytest.fixture
def compiled_afresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Compilation takes seconds a layer.
@pytest.mark.parametrize("tiny_llama", [{"num_hidden_layers": 1}], ids=["layers 1"], indirect=True)
@pytest.mark.parametrize("repo", [{"layers": (0,), **ROUTED}], ids=["routed"], indirect=True)
@pytest.mark.usefixtures("compiled_afresh")
def test_compiled_as_one_graph_forward_and_backward(spliced):
    other = copy.deepcopy(spliced)
    compiled = torch.compile(spliced.forward, backend="eager", fullgraph=True)
    loss, want = (run(IDS, labels=IDS, use_cache=False).loss for run in (compiled, other))
    loss.backward()
    want.backward()
    assert torch.equal(loss, want)
    gradients = {name: parameter.grad for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert gradients
    for name, parameter in spliced.named_parameters():
        assert (parameter.grad is not None) == (name in gradients)
        assert name not in gradients or torch.allclose(parameter.grad, gradients[name], atol=1e-6)
