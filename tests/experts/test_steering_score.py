import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluation_cases import decomposition
from factories import make_tiny_llama
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from mxd.experts import FeatureContexts, random_directions, steer_prompts, steering_score
from mxd.experts.steering_score import _next_strengths, wilson_interval

FAST = {"new_tokens": 0, "batch_tokens": 64}


def prompts(count=3, tokens=5, words=64):
    ids = torch.randint(2, words, (count, tokens), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 0
    return ids


def contexts_of(followers):
    """Features that are active at position 1 of two rows each, which the given tokens follow."""
    rows, places = [], []
    for following in followers:
        begin = len(rows)
        rows += [[0, 2 + len(rows), token, 3, 4, 5] for token in following]
        places.append((np.arange(begin, len(rows)), np.ones(len(following), int), np.full(len(following), 2.0)))
    return FeatureContexts(list(range(len(followers))), rows, list(range(len(rows))), places)


@torch.no_grad()
def next_log_p(model, ids, layer=None, vector=0.0):
    """Log-probabilities of the next token, with a vector added to the output of a layer's MLP."""

    def add(module, args, output):
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    hook = None if layer is None else layer.register_forward_hook(add)
    log_p = F.log_softmax(model(input_ids=ids).logits[:, -1], dim=-1)
    if hook is not None:
        hook.remove()
    return log_p


MLPS = {
    "llama": "model.layers.1.mlp", "gpt2": "transformer.h.1.mlp", "gpt_neox": "gpt_neox.layers.1.mlp",
    "opt": "model.decoder.layers.1.fc2", "mixtral": "model.layers.1.mlp", "falcon": "transformer.h.1.mlp",
}  # fmt: skip


@pytest.mark.parametrize("kind", MLPS)
def test_strength_is_that_of_equal_kl_and_the_rise_that_of_a_hook(kind):
    torch.manual_seed(0)
    changes = {"initializer_range": 0.3, "init_std": 0.3}
    if kind == "mixtral":  # no router after the layer, which would make KL jump
        changes["num_hidden_layers"] = 2
    config = tiny_config(kind, **{name: value for name, value in changes.items() if hasattr(tiny_config(kind), name)})
    model = make_tiny_llama() if kind == "llama" else AutoModelForCausalLM.from_config(config).eval()
    ids = prompts(words=30)
    directions = 3 * random_directions(7, model.get_input_embeddings().weight.shape[1])
    found = steer_prompts(model, 1, directions, ids, kl=0.2, **FAST)
    assert found.kl.tolist() == pytest.approx([0.2] * 7, rel=0.03)
    untouched, mlp = next_log_p(model, ids), model.get_submodule(MLPS[kind])
    for number, (strength, direction) in enumerate(zip(found.strengths, directions, strict=True)):
        steered = next_log_p(model, ids, mlp, strength * direction)
        kl = (untouched.exp() * (untouched - steered)).sum(-1).mean()
        assert float(kl) == pytest.approx(float(found.kl[number]), rel=1e-3)
        torch.testing.assert_close(found.rise[number], (steered - untouched).mean(0), atol=1e-4, rtol=1e-3)
    assert found.loss.isnan().all()


def test_a_direction_that_writes_its_targets_is_above_random_ones(tiny_llama):
    ids, tokens = prompts(), [(10, 11), (20, 21), (30, 31)]
    towards = F.normalize(tiny_llama.lm_head.weight.detach(), dim=1)
    directions = torch.stack([towards[list(pair)].sum(0) for pair in tokens])
    controls = steer_prompts(tiny_llama, 2, random_directions(60, 16), ids, **FAST)
    found = steering_score(tiny_llama, 2, contexts_of(tokens), directions, ids, controls, **FAST)
    assert found["moves"]["mean"] == 1 and found["percentile_targets"]["mean"] == 1
    assert all(one["rise"] > 0 and one["kl"] == pytest.approx(0.5, rel=0.03) for one in found["features"])
    for one in found["features"]:
        assert one["strength_of_maximum"] == pytest.approx(one["strength"] / 2)
    against = steering_score(tiny_llama, 2, contexts_of(tokens), -directions, ids, controls, **FAST)
    assert against["moves"]["mean"] == 0 and against["percentile_random"]["mean"] < 0.2


def test_random_features_are_at_chance(tiny_llama):
    ids, rng = prompts(), np.random.default_rng(0)
    contexts = contexts_of(rng.integers(2, 64, (40, 2)).tolist())
    controls = steer_prompts(tiny_llama, 1, random_directions(100, 16), ids, **FAST)
    found = steering_score(tiny_llama, 1, contexts, random_directions(40, 16, seed=5), ids, controls, **FAST)
    assert found["percentile_random"]["mean"] == pytest.approx(0.5, abs=0.12)
    assert found["percentile_targets"]["mean"] == pytest.approx(0.5, abs=0.12)
    assert found["moves"]["mean"] <= 0.2


def test_a_function_may_depend_on_the_input(tiny_llama):
    ids, layer = prompts(), decomposition().layer(1)

    def by_coefficient(x, numbers):
        return layer.modulation[numbers][:, None] * layer.decoder(layer.hidden(x))

    found = steer_prompts(tiny_llama, 1, by_coefficient, ids, 4, kl=0.1, **FAST)
    assert found.kl.tolist() == pytest.approx([0.1] * 4, rel=0.03)
    mlp, xs = tiny_llama.model.layers[1].mlp, []
    with mlp.register_forward_pre_hook(lambda _, args: xs.append(args[0])), torch.no_grad():
        tiny_llama(input_ids=ids)
        vector = found.strengths[2] * by_coefficient(xs[0], torch.full((len(ids),), 2))
    rise = (next_log_p(tiny_llama, ids, mlp, vector) - next_log_p(tiny_llama, ids)).mean(0)
    torch.testing.assert_close(found.rise[2], rise, atol=1e-4, rtol=1e-3)
    contexts = contexts_of([(10, 11), (20, 21)])
    contexts.features[:] = [2, 3]  # of the representation
    controls = steer_prompts(tiny_llama, 1, random_directions(20, 16), ids, kl=0.1, **FAST)
    scored = steering_score(tiny_llama, 1, contexts, by_coefficient, ids, controls, kl=0.1, **FAST)
    assert [one["feature"] for one in scored["features"]] == [2, 3]
    assert scored["features"][0]["strength"] == pytest.approx(float(found.strengths[2]), rel=1e-3)


def test_the_cost_is_likelihood_lost_under_the_untouched_model(tiny_llama):
    ids, directions = prompts(), random_directions(6, 16)
    loss = {
        kl: steer_prompts(tiny_llama, 1, directions, ids, kl=kl, new_tokens=12, batch_tokens=200).loss.mean()
        for kl in (1e-4, 2.0)
    }
    assert abs(loss[1e-4]) < 0.3 < loss[2.0]
    assert not tiny_llama.model.layers[1].mlp._forward_hooks


def test_batches_change_nothing_and_seeds_repeat(tiny_llama):
    ids, directions = prompts(), random_directions(5, 16)
    one, other = (steer_prompts(tiny_llama, 1, directions, ids, new_tokens=0, batch_tokens=n) for n in (1, 500))
    for mine, others in zip(one[:3], other[:3], strict=True):
        torch.testing.assert_close(mine, others, atol=1e-4, rtol=1e-3)
    tiny_llama.generation_config.top_k, tiny_llama.generation_config.repetition_penalty = 1, 9.0
    again = [steer_prompts(tiny_llama, 1, directions, ids, new_tokens=3, seed=4).loss for _ in range(2)]
    assert torch.equal(*again)
    plain = make_tiny_llama()
    assert torch.equal(again[0], steer_prompts(plain, 1, directions, ids, new_tokens=3, seed=4).loss)


def test_what_cannot_steer_is_refused(tiny_llama):
    directions = random_directions(3, 16)
    directions[1] = 0
    with pytest.raises(ValueError, match="direction 1 is 0"):
        steer_prompts(tiny_llama, 1, directions, prompts(), **FAST)
    with pytest.raises(ValueError, match="count must say"):
        steer_prompts(tiny_llama, 1, lambda x, numbers: x, prompts(), **FAST)
    controls = steer_prompts(tiny_llama, 1, random_directions(3, 16), prompts(), **FAST)
    last = FeatureContexts([0], [[0, 5]], [0], [(np.array([0]), np.array([1]), np.array([1.0]))])
    with pytest.raises(ValueError, match="feature 0 has no context with a next token"):
        steering_score(tiny_llama, 1, last, directions, prompts(), controls, **FAST)
    t5 = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    t5.config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="encoder–decoder"):
        steer_prompts(t5, 1, directions, prompts(), **FAST)


def test_the_search_goes_the_right_way_from_any_kl():
    reached = torch.tensor([0.0, -1e-9, 0.125, 2.0, math.inf, math.nan])
    low, high, one = torch.zeros(6), torch.full((6,), torch.inf), torch.ones(6)
    found = _next_strengths(one, reached, 0.5, low, high, torch.arange(6))
    assert found.tolist() == pytest.approx([4, 4, 2, 0.5, 0.25, 0.25])
    assert low.tolist() == [1, 1, 1, 0, 0, 0] and high.tolist() == [math.inf] * 3 + [1] * 3
    low[:], high[:] = 0.25, 1.5625  # a step outside of the bracket becomes the geometric mean
    assert _next_strengths(one, reached, 0.5, low, high, torch.arange(6))[0] == pytest.approx(1.25)


def test_wilsons_interval():
    assert wilson_interval(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)
    low, high = wilson_interval(0, 20)
    assert low == pytest.approx(0, abs=1e-9) and 0 < high < 0.2 and math.isclose(wilson_interval(20, 20)[1], 1)
