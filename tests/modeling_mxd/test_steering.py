"""Steering: what it computes, at which positions and rows, in every way of running a model, and that it ends."""

import copy
import gc
import json
import pickle
import re

import pytest
import torch
from factories import FORMS, GLU, make_tiny_llama, random_mxd_model, with_directions, word_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CompileConfig,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from mxd.modeling_mxd import MxDModel, Steering, SteeringChange, SurgeryError, make_spliced

IDS = torch.arange(2, 12)[None]
CHANGE = {"layer": 0, "expert": 3, "strength": 30.0}
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def spliced(layers=(0, 2), base=None, **changes):
    torch.manual_seed(1)
    base = base or make_tiny_llama()
    return make_spliced(base, with_directions(random_mxd_model(layers, **{**GLU, **changes})), "decomposition").eval()


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(ids, **inputs).logits


def outputs(model, layer=0):
    """Collect what the layer returns, (rows, tokens, O), in every forward pass."""
    seen = []
    model.decomposition.layer(layer).register_forward_hook(
        lambda _, args, y: seen.append((args[0], y.detach().clone()))
    )
    return seen


def moved(model, run, layer=0):
    """Return where each forward pass of `run` was steered at the layer, (rows, tokens) bool."""
    seen = outputs(model, layer)
    run()
    plain = model.decomposition.layer(layer)
    return [(y - plain.decode(plain.encode(x), x)).abs().amax(-1) > 1e-3 for x, y in seen]


@pytest.mark.parametrize("form", FORMS)
def test_by_direction_adds_strength_times_maximum_times_direction(form):
    model = spliced(**FORMS[form])
    direction, maximum = model.decomposition.directions(0)
    plain = outputs(model)
    logits(model)
    with model.steer(CHANGE):
        logits(model)
    torch.testing.assert_close(plain[1][1] - plain[0][1], (30 * maximum[3] * direction[3]).expand(1, 10, 16))


@pytest.mark.parametrize("by", ["add", "set", "scale", "ablate"])
@pytest.mark.parametrize("positions", ["all", [0, 5]])
def test_by_coefficient_is_an_intervention_in_units_of_the_maximum(by, positions):
    model = spliced()
    layer, unit = (
        model.decomposition.layer(0),
        1.0 if by == "scale" else float(model.decomposition.directions(0).maximum[3]),
    )
    expected = {by: 3} if by == "ablate" else {by: {3: 2 * unit}}
    with layer.record() as plain:
        logits(model)
    with layer.intervene(**expected), layer.record() as want:
        logits(model)
    with model.steer({**CHANGE, "by": by, "strength": 2, "positions": positions}), layer.record() as recorded:
        logits(model)
    dense, want, plain = (one[0].to_dense(24) for one in (recorded, want, plain))
    chosen = torch.ones(10, 1).bool() if positions == "all" else (torch.arange(10) < 5)[:, None]
    torch.testing.assert_close(dense, torch.where(chosen, want, plain))
    assert not torch.equal(dense, plain)


def test_changes_are_made_in_their_order():
    model = spliced()
    with model.decomposition.layer(0).record() as recorded, model.steer([{**CHANGE, "by": "add"}]):
        pass
    layer = model.decomposition.layer(0)
    unit = float(model.decomposition.directions(0).maximum[3])
    steering = [{**CHANGE, "by": "set", "strength": 3}, {**CHANGE, "by": "scale", "strength": 2}]
    for given, expected in ((steering, 6 * unit), (steering[::-1], 3 * unit)):
        with model.steer(given), layer.record() as recorded:
            logits(model)
        torch.testing.assert_close(recorded[0].to_dense(24)[..., 3], torch.full((1, 10), expected))


BATCH = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13], [0, 14, 15, 16, 17, 18]])
MASK = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])


def expected_positions(positions, rows=None):
    """Where a batch of three rows, padded on the left, with two generated tokens is steered, (3, 8) bool."""
    mask = torch.cat([MASK, torch.ones(3, 2, dtype=torch.long)], 1).bool()
    places = mask.cumsum(-1) - 1
    chosen = {
        "all": mask,
        "prompt": mask & (torch.arange(8) < 6),
        "generated": mask & (torch.arange(8) >= 6),
    }.get(positions if isinstance(positions, str) else "")
    if chosen is None and isinstance(positions[0], list):
        chosen = torch.nn.functional.pad(torch.tensor(positions).bool(), (0, 8 - len(positions[0]))) & mask
    elif chosen is None:
        chosen = mask & (places >= positions[0]) & (places < (99 if positions[1] is None else positions[1]))
    if rows is not None:
        chosen = chosen & torch.tensor([[row in rows] for row in range(3)])
    return chosen


POSITIONS = {
    "all": "all", "prompt": "prompt", "generated": "generated", "from": [1, None], "from to": [2, 7], "first": [0, 1],
    "mask": [[1, 0, 0, 1, 0, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]],
}  # fmt: skip
WAYS = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "returned sequences": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 2},
}


def steered_positions(model, how, **change):
    """Return the steered positions of every row that was generated, (rows, 8), from all forward passes."""
    change = {**CHANGE, "rows": None, "positions": "all", **change}
    change |= {"rows": [0, 1, 2]} if change["rows"] is None and change["positions"] == "all" else {}
    settings = {**GENERATE, "max_new_tokens": 3, "min_new_tokens": 3, **how}
    with model.steer(change):
        torch.manual_seed(0)
        passes = moved(model, lambda: model.generate(BATCH, attention_mask=MASK, **settings))
    if how.get("use_cache") is False:
        return passes[-1]
    return torch.cat(passes, 1)


@pytest.mark.parametrize("rows", [None, [1], [0, 2, 9]], ids=str)
@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
@pytest.mark.parametrize("way", WAYS)
def test_positions_and_rows_in_every_way_of_generating(way, positions, rows):
    found = steered_positions(spliced(), WAYS[way], positions=positions, rows=rows)
    expected = expected_positions(positions, rows)
    expected = expected.repeat_interleave(len(found) // 3, 0)
    attended = torch.cat([MASK, torch.ones(3, 2, dtype=torch.long)], 1).bool().repeat_interleave(len(found) // 3, 0)
    assert torch.equal(found & attended, expected)


@pytest.mark.parametrize("positions", ["prompt", "generated", [3, 8]], ids=str)
@pytest.mark.parametrize("way", ["no cache", "static cache", "chunks", "assisted"])
def test_generated_tokens_are_those_with_a_cache(way, positions):
    model = spliced()
    how = {"assistant_model": make_tiny_llama(), "min_new_tokens": None} if way == "assisted" else WAYS[way]
    with model.steer([{**CHANGE, "positions": positions}, {**CHANGE, "layer": 2, "by": "set", "positions": positions}]):
        want = model.generate(IDS, **{**GENERATE, **({"min_new_tokens": None} if way == "assisted" else {})})
        assert torch.equal(model.generate(IDS, **{**GENERATE, **how}), want)
    assert not torch.equal(model.generate(IDS, **GENERATE), want)


def test_rows_of_a_padded_batch_are_steered_as_alone():
    model = spliced()
    with model.steer({**CHANGE, "positions": [1, 4]}):
        together = model.generate(BATCH, attention_mask=MASK, **GENERATE)
        for row, length in enumerate(MASK.sum(-1).tolist()):
            alone = model.generate(BATCH[row : row + 1, -length:], **GENERATE)
            assert torch.equal(together[row, -6:], alone[0, -6:])


BASES = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_inner=40, n_positions=64)),
    "bloom": (BloomForCausalLM, BloomConfig(vocab_size=64, hidden_size=16, n_layer=3, n_head=2)),
    "falcon": (
        FalconForCausalLM,
        FalconConfig(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, alibi=True),
    ),
}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("positions", ["prompt", "generated", [2, 7]], ids=str)
def test_other_models(kind, positions):
    cls, config = BASES[kind]
    torch.manual_seed(0)
    changes = {"encoder_type": "mlp", "hidden_act": "gelu", "intermediate_size": 40}
    model = spliced(base=cls(config).eval(), **changes)
    assert torch.equal(steered_positions(model, {}, positions=positions), expected_positions(positions))


def test_a_pass_outside_of_generate():
    model = spliced()
    with torch.no_grad():
        cache = model(IDS[:, :6]).past_key_values
    for positions, first, second in (("prompt", 6, 0), ("generated", 0, 4), ([5, 7], 1, 1)):
        with model.steer({**CHANGE, "positions": positions}):
            assert moved(model, lambda: logits(model, IDS[:, :6]))[0].sum() == first
            later = moved(model, lambda: logits(model, IDS[:, 6:], past_key_values=copy.deepcopy(cache)))
            assert later[-1].sum() == second


def test_inputs_embeds_are_a_prompt_too():
    model = spliced()
    embeds = model.get_input_embeddings()(IDS).detach()
    with model.steer({**CHANGE, "positions": "prompt"}):
        passes = moved(model, lambda: model.generate(inputs_embeds=embeds, **GENERATE))
    assert [int(one.sum()) for one in passes] == [10, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("above", [None, 0.5])
@pytest.mark.parametrize("positions", ["all", [3, 9]], ids=str)
def test_only_where_another_expert_fires(layer, above, positions):
    model = spliced()
    when = {"layer": 0, "expert": 8} | ({} if above is None else {"above": above})
    with model.decomposition.layer(0).record() as recorded:
        logits(model)
    fires = recorded[0].to_dense(24)[..., 8] > (above or 0) * model.decomposition.directions(0).maximum[8]
    assert 0 < fires.sum() < 10
    with model.steer({**CHANGE, "layer": layer, "when": when, "positions": positions}):
        (found,) = moved(model, lambda: logits(model), layer)
    places = torch.arange(10)
    assert torch.equal(found, fires if positions == "all" else fires & (places >= 3) & (places < 9))


def test_a_condition_reads_the_gate_before_the_steering():
    model = spliced()
    steering = [{**CHANGE, "by": "ablate"}, {**CHANGE, "when": {"layer": 0, "expert": 3}}]
    with model.decomposition.layer(0).record() as recorded:
        logits(model)
    with model.steer(steering[1:]):
        (found,) = moved(model, lambda: logits(model))
    with model.steer(steering):
        seen = outputs(model)
        logits(model)
    assert torch.equal(found, recorded[0].to_dense(24)[..., 3] > 0) and found.any()
    assert len(seen) == 1


@pytest.fixture
def compiled_afresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    gc.collect()


@pytest.mark.usefixtures("compiled_afresh")
@pytest.mark.parametrize("style", ["forward", "generate"])
def test_compiled(style):
    model, plain = (spliced((0,), make_tiny_llama(num_hidden_layers=1)) for _ in range(2))
    steering = [CHANGE, {**CHANGE, "by": "add", "positions": [2, 11]}]
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    want = plain.generate(IDS, **how)
    with plain.steer(steering):
        steered, steered_logits = plain.generate(IDS, **how), logits(plain, use_cache=False)
    if style == "forward":
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
    else:  # it compiles the whole call
        how["compile_config"] = CompileConfig(backend="eager", fullgraph=False, mode=None)
        how["compile_config"]._compile_all_devices = True
    before = logits(model, use_cache=False)
    assert style != "generate" or torch.equal(model.generate(IDS, **how), want)
    with model.steer(steering):
        torch.testing.assert_close(logits(model, use_cache=False), steered_logits)
        assert style != "generate" or torch.equal(model.generate(IDS, **how), steered)
    assert torch.equal(logits(model, use_cache=False), before)
    assert style != "generate" or torch.equal(model.generate(IDS, **how), want)


def test_it_ends_also_after_an_exception_and_in_any_order():
    model = spliced()
    before, attributes = logits(model), set(vars(model))
    with pytest.raises(RuntimeError), model.steer(CHANGE):
        raise RuntimeError
    first, second = model.steer(CHANGE), model.steer({**CHANGE, "layer": 2, "positions": [0, 3]})
    with model.steer({**CHANGE, "layer": 2, "positions": [0, 3]}):
        first.remove()
        first.remove()
    alone = logits(model)
    second.remove()
    with model.steer({**CHANGE, "layer": 2, "positions": [0, 3]}):
        assert torch.equal(logits(model), alone)
    assert torch.equal(logits(model), before) and not torch.equal(alone, before)
    assert set(vars(model)) == attributes
    assert not any(layer._output_hooks or layer._coefficient_hooks for layer in model.decomposition.layers.values())


def test_an_exception_inside_generate_leaves_the_next_one_right():
    model = spliced()

    def stop(*_):
        raise KeyboardInterrupt

    with model.steer({**CHANGE, "positions": "prompt"}):
        want = logits(model)
        with pytest.raises(KeyboardInterrupt):
            model.generate(IDS[:, :3], **GENERATE, logits_processor=[stop])
        assert torch.equal(logits(model), want)


def test_unsplicing_ends_it():
    base = make_tiny_llama()
    before = logits(base)
    model = spliced(base=base)
    model.steer(CHANGE)
    with model.untouched():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model.unsplice()), before)
    assert "forward" not in vars(base)


def test_a_base_into_which_it_is_spliced(tiny_llama):
    mxd = with_directions(random_mxd_model((0, 2), **GLU))
    with pytest.raises(SurgeryError, match="is not spliced into this model"):
        mxd.steer(tiny_llama, CHANGE)
    with mxd.spliced(tiny_llama):
        before = logits(tiny_llama)
        with mxd.steer(tiny_llama, CHANGE):
            assert not torch.equal(logits(tiny_llama), before)
        assert torch.equal(logits(tiny_llama), before)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_steered_by_themselves(duplicate):
    model = spliced()
    before = logits(model)
    model.steer({**CHANGE, "positions": [2, 6]})
    steered = logits(model)
    other = duplicate(model)
    model.unsteer()
    assert torch.equal(logits(other), steered) and torch.equal(logits(model), before)
    other.unsteer()
    assert torch.equal(logits(other), before)


def test_encoder_decoder_models_are_steered_everywhere_only():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_ff=40, num_layers=2, num_heads=2, d_kv=8, decoder_start_token_id=0)
    base = T5ForConditionalGeneration(config).eval()
    mxd = with_directions(
        random_mxd_model((1,), stack="decoder.block", encoder_bias=False, output_bias=False, hidden_act="relu")
    )
    with mxd.spliced(base):
        before = base.generate(IDS, max_new_tokens=4)
        with mxd.steer(base, {**CHANGE, "layer": 1, "strength": 300}):
            assert not torch.equal(base.generate(IDS, max_new_tokens=4), before)
        with pytest.raises(ValueError, match="at all positions and rows only"):
            mxd.steer(base, {**CHANGE, "layer": 1, "positions": "prompt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_stays(dtype):
    model = spliced().to(dtype)
    steering = [{**CHANGE, "positions": [0, 4]}, {**CHANGE, "by": "add", "positions": [0, 4]}]
    with model.steer(steering):
        assert logits(model).dtype == dtype


def test_inside_a_pipeline():
    model = spliced()
    generate = pipeline("text-generation", model=model, tokenizer=word_tokenizer(pad_token="word0"))
    how = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    prompts = ["word3 word4 word5", "word7"]
    before = generate(prompts, **how)
    with model.steer({**CHANGE, "positions": "prompt"}):
        steered = generate(prompts, **how)
        assert steered == [generate(prompt, **how) for prompt in prompts]  # padding does not matter
    assert steered != before == generate(prompts, **how)


FULL = [
    {"layer": 0, "expert": 3, "strength": 2.5, "by": "set", "positions": [1, None], "rows": [0], "when": None},
    {"layer": 2, "expert": 5, "strength": -1.0, "by": "direction", "positions": [[0, 1]], "rows": None,
     "when": {"layer": 0, "expert": 2, "above": 0.25}},
]  # fmt: skip


def test_json_holds_all_of_it(tmp_path):
    steering = Steering(FULL)
    assert steering[0] == SteeringChange(0, 3, 2.5, "set", [1, None], [0])
    steering.to_json(tmp_path / "one.json")
    again = Steering.from_json(tmp_path / "one.json")
    assert again == steering
    assert json.loads((tmp_path / "one.json").read_text()) == {"format_version": 1, "changes": FULL}
    mask = torch.tensor([[True, False]])
    assert SteeringChange(0, 3, positions=mask).positions == [[True, False]]


@pytest.mark.parametrize(
    "change",
    [
        {"layer": -1}, {"layer": True}, {"expert": "3"}, {"strength": "2"}, {"strength": float("nan")}, {"by": "push"},
        {"positions": "some"}, {"positions": [3]}, {"positions": [-1, 3]}, {"positions": [[1, 0], [1]]},
        {"positions": []},
        {"positions": [[2]]}, {"rows": [-1]}, {"rows": 3}, {"when": {"layer": 0}},
        {"when": {"expert": 2, "layer": 0, "x": 1}},
        {"other": 1},
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_meaning_is_refused(tmp_path, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Steering([{**CHANGE, **change}])
    (tmp_path / "one.json").write_text(json.dumps({"format_version": 1, "changes": [{**CHANGE, **change}]}))
    with pytest.raises(ValueError, match=r"one\.json"):
        Steering.from_json(tmp_path / "one.json")


@pytest.mark.parametrize(
    "content",
    [
        '{"changes": []}',
        '{"format_version": 2, "changes": []}',
        "[]",
        "{",
        '{"format_version": 1, "changes": [], "x": 1}',
        '{"format_version": 1, "changes": [3]}',
    ],
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(ValueError, match=r"one\.json"):
        Steering.of(tmp_path / "one.json")


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"format_version": 1, "format_version": 1, "changes": []}', "format_version"),
        ('{"format_version": 1, "changes": [], "changes": [{"layer": 0, "expert": 3}]}', "changes"),
        ('{"format_version": 1, "changes": [{"layer": 0, "expert": 3, "strength": 1, "strength": 9}]}', "strength"),
        (
            '{"format_version": 1, "changes": [{"layer": 0, "expert": 3, "when": {"layer": 0, "expert": 1, "expert": 2}'
            "}]}",
            "expert",
        ),
    ],
    ids=["version", "changes", "field", "condition"],
)  # fmt: skip
def test_a_key_that_is_named_twice_is_refused(tmp_path, content, key):
    (tmp_path / "one.json").write_text(content)
    with pytest.raises(ValueError, match=rf"one\.json names '{key}' twice"):
        Steering.of(tmp_path / "one.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 1}, "names expert 3 of layer 1; the numbers of experts are layer 0: 24, layer 2: 24"),
        ({"expert": 24}, "names expert 24 of layer 0"),
        ({"expert": 7}, "expert 7 of layer 0 was never active"),
        ({"when": {"layer": 2, "expert": 1}}, "cannot depend on layer 2, which comes later"),
        ({"when": {"layer": 0, "expert": 99}}, "names expert 99"),
    ],
    ids=str,
)
def test_what_the_decomposition_does_not_have_is_refused(change, message):
    model = spliced()
    model.decomposition.directions(0).maximum[7] = 0
    with pytest.raises(ValueError, match=re.escape(message)):
        model.steer({**CHANGE, **change})
    assert "forward" not in vars(model) and not model.decomposition.layer(0)._output_hooks


def test_without_directions_only_what_needs_none():
    model = make_spliced(make_tiny_llama(), random_mxd_model((0,), **GLU), "decomposition")
    with pytest.raises(ValueError, match="mxd experts FOLDER"):
        model.steer(CHANGE)
    with (
        model.steer({**CHANGE, "by": "scale"}),
        model.steer({**CHANGE, "by": "ablate", "when": {"layer": 0, "expert": 2}}),
    ):
        logits(model)


@pytest.mark.parametrize("place", ["machine", "repo"])
@pytest.mark.parametrize("door", ["steering=", "steer"])
def test_a_file_loads_with_the_model_and_after_it(repo, spliced_repo, tmp_path, monkeypatch, place, door):
    folder = tmp_path / "here" if place == "machine" else spliced_repo
    folder.mkdir(exist_ok=True)
    Steering([CHANGE]).to_json(folder / "formal.json")
    monkeypatch.chdir(folder if place == "machine" else tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(spliced_repo)
    if door == "steering=":
        model = AutoModelForCausalLM.from_pretrained(spliced_repo, steering="formal.json", trust_remote_code=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(spliced_repo)
        model.steer(folder / "formal.json")
    with plain.steer(CHANGE):
        assert torch.equal(logits(model), logits(plain))
    model.unsteer()
    assert torch.equal(logits(model), logits(plain))
    with pytest.raises(ValueError, match=r"there is no steering other\.json here, nor in"):
        AutoModelForCausalLM.from_pretrained(spliced_repo, steering="other.json")


@pytest.fixture
def spliced_repo(repo):
    with_directions(MxDModel.from_pretrained(repo)).save_pretrained(repo)
    return repo


@pytest.mark.parametrize("positions", [[5, 2], [1, 1]])
def test_a_range_that_holds_nothing_is_refused(positions):
    with pytest.raises(ValueError, match="from < to"):
        SteeringChange(1, 0, positions=positions)


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_no_steering_is_refused(given):
    with pytest.raises(ValueError, match="a steering is changes"):
        Steering.of(given)


@pytest.mark.parametrize("strength", [1e308, 10**400, float("nan")])
def test_a_strength_that_no_output_can_take_is_refused(strength):
    with pytest.raises(ValueError, match="finite number"):
        SteeringChange(1, 0, strength)


def test_positions_of_one_pass_are_not_used_for_another():
    model = spliced()
    with torch.no_grad(), model.steer({"layer": 0, "expert": 3, "strength": 5.0, "positions": [0, 2]}):
        model(input_ids=IDS)
        with pytest.raises(ValueError, match="forward pass of the whole model"):
            model.model(input_ids=IDS)


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "maximum"), (-1.0, "maximum"), (float("inf"), "direction")])
def test_directions_with_values_that_mean_nothing_are_refused(value, name):
    model = random_mxd_model((0,))
    layer = model.config.layer(0)
    maxima, directions = {0: torch.ones(layer.num_experts)}, {0: torch.ones(layer.num_experts, layer.output_size)}
    (maxima if name == "maximum" else directions)[0].view(-1)[1] = value
    with pytest.raises(ValueError, match=f"layers.0.{name}"):
        model.set_directions(maxima, directions, "")


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_of_keys_and_values_is_found_under_the_name_of_any_transformers(name):
    model = spliced()
    cache = model(IDS[:, :4], use_cache=True).past_key_values
    with model.steer(CHANGE):
        read = vars(model)["_steering"].read({"input_ids": IDS[:, 4:], name: cache})
    assert read.columns.tolist() == list(range(4, 10))
