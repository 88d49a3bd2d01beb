import numpy as np
import pytest
import torch
from evaluation_cases import activations, decomposition, pad
from factories import word_tokenizer
from reference import dense_coefficients
from text_cases import build_tokenizer
from tiny_models import tiny_config
from transformers import AutoModel, AutoModelForCausalLM

from mxd.evaluation import expert_representation, neuron_representation, output_representation
from mxd.experts import FeatureContexts, collect_contexts, most_active
from mxd.experts.feature_contexts import Context
from mxd.modeling_mxd import find_mlp


def rows(count=4, tokens=9, seed=0):
    ids = torch.randint(2, 64, (count, tokens), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 0
    return ids


def representations(model, mxd, layer=1):
    site = find_mlp(model, layer)
    return {
        "a": expert_representation(mxd.layer(layer)),
        "z": most_active(neuron_representation(site), 5),
        "y": output_representation(site),
    }


def by_hand(model, mxd, ids):
    """Dense values of every token, (rows, tokens, features); of neurons, the five largest that are positive."""
    x, y = (part.unflatten(0, ids.shape) for part in activations(model, 1, [{"input_ids": ids}]))
    z = neuron_representation(find_mlp(model, 1)).encode(x, y)
    largest = z >= z.topk(5, dim=-1).values[..., -1:]
    return {"a": dense_coefficients(mxd.layer(1), x), "z": torch.where(largest, z, 0).relu(), "y": y.relu()}


@pytest.mark.parametrize("include_first", [False, True])
@pytest.mark.parametrize("method", ["mxd", "transcoder", "skip_transcoder"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 2), (3, 0)])
def test_contexts_are_where_features_are_active_padded_rows_too(tiny_llama, method, left, right, include_first):
    mxd, ids = decomposition(method=method), rows()
    batches = [pad({"input_ids": part}, left, right) for part in (ids[:3], ids[3:])]
    features = {"a": [5, 0, 23, 11], "z": [39, 2, 7], "y": [1]}
    found = collect_contexts(
        tiny_llama, 1, batches, representations(tiny_llama, mxd), features, include_first=include_first
    )
    for name, dense in by_hand(tiny_llama, mxd, ids).items():
        assert found[name].rows == ids.tolist() and found[name].features == features[name]
        for index, feature in enumerate(features[name]):
            values = dense[..., feature].detach().clone()
            values[:, 0] *= include_first
            row, position, value = found[name].places[index]
            expected = values.nonzero()
            assert np.stack([row, position], 1).tolist() == expected.tolist()
            torch.testing.assert_close(torch.as_tensor(value), values[values > 0], atol=1e-5, rtol=1e-4)


def test_directions_are_what_a_feature_adds(tiny_llama):
    layer = decomposition(method="transcoder").layer(1)
    assert torch.equal(expert_representation(layer).directions, layer.decoder)
    z = neuron_representation(find_mlp(tiny_llama, 1))
    weight = tiny_llama.model.layers[1].mlp.down_proj.weight
    assert torch.equal(z.directions, weight.T) and torch.equal(most_active(z, 3).directions, weight.T)
    mxd = decomposition().layer(1)
    assert expert_representation(mxd).directions is None
    assert torch.equal(expert_representation(mxd, torch.eye(24)).directions, torch.eye(24))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "opt", "gemma2", "mixtral"])
def test_other_models_are_read(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind)).eval()
    site = find_mlp(model, 1)
    name, make = ("y", output_representation) if kind == "mixtral" else ("z", neuron_representation)
    ids = torch.randint(2, 40, (3, 6))
    found = collect_contexts(model, 1, [{"input_ids": ids}], {name: make(site)}, {name: [3]})[name]
    assert found.rows == ids.tolist() and len(found.places[0][0])


def test_what_cannot_be_read_is_refused(tiny_llama):
    found, batch = representations(tiny_llama, decomposition()), [{"input_ids": rows()}]
    with pytest.raises(ValueError, match="a has no feature 24: they are 0 to 23"):
        collect_contexts(tiny_llama, 1, batch, found, {"a": [0, 24]})
    with pytest.raises(ValueError, match="one number for each of the 4 rows, got 3"):
        collect_contexts(tiny_llama, 1, batch, found, {"a": [0]}, documents=[1, 2, 3])
    with pytest.raises(ValueError, match="batches is empty"):
        collect_contexts(tiny_llama, 1, [], found, {"a": [0]})
    albert = AutoModel.from_config(tiny_config("albert", num_hidden_layers=2))
    with pytest.raises(ValueError, match="several times a pass"):
        collect_contexts(albert, 0, batch, {"y": output_representation(find_mlp(albert, 0))}, {"y": [0]})


def made(rows, places, documents=None, **changes):
    """Contexts of one feature, {(row, position): value}."""
    row, position = (np.array(part) for part in zip(*places, strict=True))
    values = np.array(list(places.values()), dtype=np.float32)
    return FeatureContexts(
        [7], rows, list(range(len(rows))) if documents is None else documents, [(row, position, values)], **changes
    )


def test_top_contexts_are_of_distinct_documents_and_do_not_repeat_each_other():
    texts = [[0, *(100 * row + np.arange(40)).tolist()] for row in range(5)]
    texts[3] = [*texts[0][:30], 900, 901]  # nearly the first row again
    places = {(0, 5): 9.0, (0, 9): 8.0, (1, 4): 7.0, (3, 5): 6.0, (2, 30): 5.0, (4, 2): 1.0}
    alone = made(texts, places)
    assert alone.top(0, 9) == [(0, 5), (1, 4), (2, 30), (4, 2)]
    assert alone.top(0, 2) == [(0, 5), (1, 4)]
    grouped = made(texts, places, documents=[0, 0, 1, 2, 2])
    assert grouped.top(0, 3) == [(0, 5), (2, 30), (4, 2)]  # of three documents
    assert grouped.top(0, 4) == [(0, 5), (1, 4), (2, 30), (4, 2)]  # of rows, where documents do not suffice
    assert alone.spread(0, 2, apart=alone.top(0, 1)) == [(1, 4), (4, 2)]  # the ends of the other three
    assert alone.spread(0, 9, apart=alone.top(0, 1)) == [(1, 4), (2, 30), (4, 2)]  # not row 3, which repeats row 0
    assert alone.live(4).features == [7] and alone.live(5).features == []


def test_windows_leave_the_first_position_out_and_keep_inside_the_row():
    found = made([[0, *range(10, 60)]], {(0, 20): 4.0, (0, 30): 1.0, (0, 31): 1.2, (0, 45): 9.0})
    assert found.window(Context(0, 20)) == (8, 33) and found.window(Context(0, 3)) == (1, 16)
    assert found.window(Context(0, 49)) == (37, 51)
    assert found.firing(0, Context(0, 20)) == pytest.approx({20: 4.0, 30: 1.0, 31: 1.2})
    assert found.marked(0, Context(0, 20)) == {20, 31}  # 0.3 of 4 is 1.2, in float32 a little less
    first = made([[0, *range(10, 60)]], {(0, 0): 1.0}, include_first=True)
    assert first.window(Context(0, 3)) == (0, 16)


def test_random_contexts_are_of_distinct_rows_without_the_feature():
    texts = [[0, *range(10, 30)] for _ in range(6)]
    found = made(texts, {(row, 10): 1.0 for row in (0, 2, 3)})
    drawn = found.random_contexts(10, np.random.default_rng(0), without=0)
    assert sorted(context.row for context in drawn) == [1, 4, 5]
    assert all(1 <= context.position < 21 for context in drawn)
    assert len(found.random_contexts(4, np.random.default_rng(0))) == 4


@pytest.mark.parametrize("marks", [(2, 3), (3,), (4, 5), (1, 2, 3, 4), (6,)])
@pytest.mark.parametrize("kind", ["words", "bytes"])
def test_marks_are_around_active_tokens_and_no_character_is_lost(kind, marks):
    tokenizer = word_tokenizer() if kind == "words" else build_tokenizer(bos_token="<s>", eos_token="</s>")
    text = "word3 word4 word5 word6 word7 word8" if kind == "words" else "a €ïß, Ü"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = made([[0, *ids]], {(0, 2): 1.0})
    assert found.text(tokenizer, Context(0, 2)) == text
    marked = found.text(tokenizer, Context(0, 2), marks)
    assert marked.replace("<<", "").replace(">>", "") == text and "\ufffd" not in marked
    assert marked.count("<<") == marked.count(">>") == 1
    if kind == "words" and marks == (2, 3):
        assert marked == "word3<< word4 word5>> word6 word7 word8"
