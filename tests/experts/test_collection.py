import functools

import pytest
import torch
from evaluation_cases import activations, batches, decomposition, pad
from factories import random_mxd_model
from reference import dense_coefficients
from tiny_models import tiny_model

from mxd.base.capture import capture_mlps
from mxd.experts import Collection, collect_experts, load_collection, save_collection
from mxd.experts.collection import HISTOGRAM_EDGES
from mxd.experts.contexts import AROUND
from mxd.experts.logit_effects import find_unembedding
from mxd.experts.streamed_tables import LargestEntries, TokenSample, hashed, make_places, strongest_of_rows


def equal(one, other):
    """Whether two collections hold the same."""
    same = all(
        torch.equal(torch.as_tensor(value), torch.as_tensor(vars(other.layers[layer])[name]))
        for layer, found in one.layers.items()
        for name, value in vars(found).items()
        if value is not None
    )
    rows = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids", "offsets", "documents"))
    return same and rows and one.domains == other.domains and one.settings == other.settings


# --- tables


@pytest.mark.parametrize(("count", "batch"), [(1, 7), (5, 40), (300, 1), (300, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_largest_entries_are_those_of_a_sort(count, batch, dtype):
    table = LargestEntries(6, count, dtype, torch.device("cpu"))
    expert = torch.randint(0, 5, (400,))  # the last has none
    key = (torch.randperm(400) + 1).to(dtype)
    for part in torch.arange(400).split(batch):
        table.update(expert[part], key[part], part, key[part].float())
    for number in range(6):
        places = (expert == number).nonzero().squeeze(1)
        order = places[key[places].argsort(descending=True)][:count]
        there = len(order)
        assert torch.equal(table.places[number, :there], order) and (table.places[number, there:] == -1).all()
        assert torch.equal(table.keys[number, :there], key[order]) and not table.keys[number, there:].any()
        assert torch.equal(table.values[number, :there], key[order].float())


def test_a_row_counts_with_its_strongest_position_the_first_of_equals():
    expert, value = torch.tensor([0, 0, 0, 1, 1, 0]), torch.tensor([1.0, 3.0, 3.0, 2.0, 1.0, 5.0])
    place = make_places(torch.tensor([4, 4, 4, 4, 5, 5]), torch.tensor([0, 6, 2, 3, 1, 1]))
    order = strongest_of_rows(expert, value, place)
    found = expert[order], value[order], place[order]
    expected = ([0, 0, 1, 1], [3.0, 5.0, 2.0, 1.0], [4 << 32 | 6, 5 << 32 | 1, 4 << 32 | 3, 5 << 32 | 1])
    assert tuple(part.tolist() for part in found) == expected


def test_random_numbers_of_places_are_uniform():
    places = make_places(torch.arange(400)[:, None], torch.arange(100)).flatten()
    numbers = torch.stack([hashed(places), hashed(places, torch.tensor(3))]).double() / 2**63
    assert (numbers.min() > 0) and (numbers.max() < 1)
    assert (numbers.view(2, 10, -1).mean(-1) - 0.5).abs().max() < 0.02 and numbers.std() == pytest.approx(
        0.289, abs=0.005
    )
    assert torch.corrcoef(numbers)[0, 1].abs() < 0.02


def test_co_firing_by_hand():
    active = torch.randint(0, 9, (500, 3))
    active[active[:, 0] == active[:, 1], 1] = -1
    active[(active[:, 2:] == active[:, :2]).any(1), 2] = -1
    sample = TokenSample(10_000)
    for part in active.split(77):
        sample.update(part, torch.arange(len(part)) + 1)
    ids, values = sample.co_firing(10)
    dense = torch.zeros(500, 10)
    for line, experts in zip(dense, active, strict=True):
        line[experts[experts >= 0]] = 1
    counts = dense.sum(0) + 10
    scores = (dense.T @ dense) / (counts[:, None] * counts).sqrt()
    scores.fill_diagonal_(0)
    torch.testing.assert_close(values, scores.topk(5).values)
    assert (ids[9] == -1).all() and not values[9].any()


def test_a_sample_of_tokens_is_bounded_and_uniform():
    sample = TokenSample(1000)
    for begin in range(0, 50_000, 500):
        tokens = torch.arange(begin, begin + 500)
        sample.update(tokens[:, None], hashed(tokens))
    kept = torch.cat([experts for experts, _ in sample.parts]).flatten().double()
    assert 400 <= len(kept) <= 1000 and kept.mean() == pytest.approx(25_000, rel=0.1)


# --- the pass


@pytest.mark.parametrize("method", ["mxd", "transcoder"])
@pytest.mark.parametrize("include_first", [True, False])
def test_statistics_are_those_of_dense_coefficients(tiny_llama, method, include_first):
    rows, model = batches(count=4, rows=5, tokens=9), decomposition(layers=(0, 2), method=method)
    found = collect_experts(tiny_llama, model, rows, include_first=include_first, top=3, sample=4)
    for layer in (0, 2):
        dense = dense_coefficients(model.layer(layer), activations(tiny_llama, layer, rows)[0]).detach()
        one, inside = found.layers[layer], dense.view(20, 9, -1)[:, 0 if include_first else 1 :].flatten(0, 1)
        assert one.tokens == 180
        torch.testing.assert_close(one.frequency, (dense > 0).double().mean(0))
        torch.testing.assert_close(one.maximum, inside.amax(0))
        torch.testing.assert_close(one.top_values[:, 0], inside.amax(0))
        assert torch.equal(one.histogram.sum(1), (inside > 0).sum(0))
        for edge in (2**-3, 1.0):
            above = one.histogram[:, int((edge > HISTOGRAM_EDGES).sum()) + 1 :].sum(1)
            assert torch.equal(above, (inside >= edge).sum(0))
            torch.testing.assert_close(one.at_least(torch.arange(24), torch.full((24,), edge)), above.double())
        assert torch.equal((one.sample_values > 0).sum(1), (inside > 0).sum(0).clamp_max(4))
        assert (one.at_least(torch.arange(24), one.maximum * 1.01) == 0).all()


def places(found, layer, kind):
    """{(expert, value): (token ids, position)} of the entries of a collection."""
    one = found.layers[layer]
    parts = (getattr(one, f"{kind}_{name}").tolist() for name in ("values", "rows", "positions"))
    return {
        (expert, round(value, 5)): (tuple(found.row(row)), position)
        for expert, lines in enumerate(zip(*parts, strict=True))
        for value, row, position in zip(*lines, strict=True)
        if value > 0
    }


def runs_of_rows(model, decomposed, layer):
    """Return the dense coefficients of a row that is run alone, (runs, tokens, experts), computed once a row."""

    @functools.cache
    def runs(row):
        x = capture_mlps(model, [layer], torch.tensor([row]), **decomposed.config.where)[layer][0]
        return dense_coefficients(decomposed.layer(layer), x).detach()

    return runs


def check_places(model, decomposed, found, layer, include_first=False):
    """Every entry has the coefficient that its row, run alone, gives at its position, in one of the layer's runs."""
    known, runs_of = 0, runs_of_rows(model, decomposed, layer)
    for kind in ("top", "sample"):
        for (expert, value), (row, position) in places(found, layer, kind).items():
            runs = runs_of(row)[:, position, expert]
            assert (runs - value).abs().min() < 1e-3
            assert include_first or position > 0
            known += 1
    assert known


def check_windows(model, decomposed, found, layer):
    """Every window has the bins of the expert's coefficients around its place, and nothing beyond the row."""
    one, runs_of = found.layers[layer], runs_of_rows(model, decomposed, layer)
    for kind in ("top", "sample"):
        values, rows, positions, windows = (
            getattr(one, f"{kind}_{name}") for name in ("values", "rows", "positions", "windows")
        )
        for expert, slot in (values > 0).nonzero().tolist():
            row, position = found.row(rows[expert, slot]), int(positions[expert, slot])
            runs = runs_of(tuple(row))[..., expert].clone()
            runs[:, 0] = 0
            run = runs[(runs[:, position] - values[expert, slot]).abs().argmin()]
            expected = torch.zeros(2 * AROUND + 1)
            begin, end = max(0, position - AROUND), min(len(row), position + AROUND + 1)
            bins = torch.bucketize(run, HISTOGRAM_EDGES, right=True) + 1
            expected[begin - position + AROUND : end - position + AROUND] = (bins * (run > 0))[begin:end].float()
            assert ((windows[expert, slot] - expected).abs() <= 1).all()  # rounding at an edge
            assert torch.equal(windows[expert, slot] > 0, expected > 0)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (0, 2), (3, 0), (1, 2)])
def test_places_are_those_of_rows_without_padding(tiny_llama, left, right):
    rows, model = batches(count=3), decomposition()
    padded = [pad(batch, left=left, right=right) for batch in rows]
    found = collect_experts(tiny_llama, model, padded, top=3, sample=4)
    check_places(tiny_llama, model, found, 1)
    check_windows(tiny_llama, model, found, 1)
    plain = collect_experts(tiny_llama, model, rows, top=3, sample=4)
    for kind in ("top", "sample"):
        assert places(plain, 1, kind) == places(found, 1, kind)


@pytest.mark.parametrize("model_type", ["albert", "gpt2", "mixtral"])
def test_models_of_other_types(model_type):
    model = tiny_model(model_type).eval()
    with torch.no_grad():
        x = capture_mlps(model, [0], torch.ones(1, 3, dtype=torch.int64))[0][0]
    decomposed = random_mxd_model((0,), hidden_size=x.shape[-1], output_size=x.shape[-1], std=1.0).eval()
    ids = torch.randint(3, 30, (6, 7))
    found = collect_experts(model, decomposed, [pad({"input_ids": part}, left=1) for part in ids.split(2)], top=3)
    check_places(model, decomposed, found, 0)
    check_windows(model, decomposed, found, 0)
    runs = len(capture_mlps(model, [0], ids)[0][0]) // 6
    assert found.layers[0].tokens == 42 * runs and runs == (
        model.config.num_hidden_layers if model_type == "albert" else 1
    )


def test_batches_of_other_sizes_give_the_same(tiny_llama):
    model, ids = decomposition(layers=(0, 1)), torch.randint(0, 64, (24, 9))
    one, other = (
        collect_experts(
            tiny_llama, model, [{"input_ids": part} for part in ids.split(size)], documents=[n // 2 for n in range(24)]
        )
        for size in (3, 24)
    )
    for layer in (0, 1):
        for kind in ("top", "sample"):
            assert places(one, layer, kind) == places(other, layer, kind)
            assert torch.equal(*(getattr(each.layers[layer], f"{kind}_windows") for each in (one, other)))
        assert torch.equal(one.layers[layer].histogram, other.layers[layer].histogram)


def test_nothing_is_no_collection(tiny_llama):
    with pytest.raises(ValueError, match="batches is empty"):
        collect_experts(tiny_llama, decomposition(), [])


def test_rows_that_no_table_names_are_let_go(tiny_llama, monkeypatch):
    monkeypatch.setattr("mxd.experts.collecting._PRUNED_FROM", 8)
    monkeypatch.setattr("mxd.experts.collecting.CANDIDATES", 1)
    rows, model = batches(count=60), decomposition()
    found = collect_experts(tiny_llama, model, rows, top=1, sample=1)
    assert len(found.documents) <= 48 and found.documents.max() < 180
    check_places(tiny_llama, model, found, 1)


@pytest.mark.parametrize("method", ["mxd", "transcoder"])
def test_alignment_is_that_of_the_tokens_that_follow(tiny_llama, method):
    model, rows = decomposition(method=method), batches(count=6)
    directions = torch.randn(24, 16) if method == "mxd" else model.layer(1).expert_table.detach()
    found = collect_experts(tiny_llama, model, rows, top=3, directions={1: directions} if method == "mxd" else None)
    one, unembedding = found.layers[1], find_unembedding(tiny_llama, rows[0]["input_ids"][:1])
    inside = torch.cat([torch.tensor(found.row(row)[1:]) for row in range(len(found.documents))])
    for expert in range(24):
        effects = unembedding.effects(directions[[expert]])[0].double()
        places = zip(one.top_rows[expert].tolist(), one.top_positions[expert].tolist(), strict=True)
        following = [found.row(row)[place + 1 : place + 2] for row, place in places if row >= 0]
        following = [token for tokens in following for token in tokens]
        spread = effects[inside].std(correction=0)
        expected = (effects[following].mean() - effects[inside].mean()) / spread if following else 0.0
        assert float(one.alignment[expert]) == pytest.approx(float(expected), abs=1e-3)


def test_domains_are_counted(tiny_llama):
    rows, model = batches(count=4), decomposition()
    domains = {"even": range(0, 12, 2), "three": [1, 3, 5]}
    one = collect_experts(tiny_llama, model, rows, domains=domains).layers[1]
    dense = dense_coefficients(model.layer(1), activations(tiny_llama, 1, rows)[0]).view(12, 7, -1) > 0
    assert one.domain_tokens.tolist() == [42, 21]
    for number, of_domain in enumerate(domains.values()):
        assert torch.equal(one.domain_counts[:, number], dense[list(of_domain)].sum((0, 1)).int())


# --- the file


@pytest.fixture
def collected(tiny_llama):
    return collect_experts(
        tiny_llama, decomposition(layers=(0, 2)), batches(count=3), directions={0: torch.randn(24, 16)},
        domains={"a": [0, 1], "b": [4]}, settings={"tokens": 63, "dataset": ["ü.txt"]},
    )  # fmt: skip


def test_a_file_gives_back_what_was_saved(collected, tmp_path):
    assert collected.layers[0].promoted_ids is not None and collected.layers[2].promoted_ids is None
    save_collection(collected, tmp_path / "experts.safetensors")
    loaded = load_collection(tmp_path / "experts.safetensors")
    assert isinstance(loaded, Collection) and equal(collected, loaded) and equal(loaded, collected)
    assert [path.name for path in tmp_path.iterdir()] == ["experts.safetensors"]


def test_a_file_of_an_earlier_version_is_read(collected, tmp_path):
    for one in collected.layers.values():
        one.alignment = one.top_windows = one.sample_windows = None
    save_collection(collected, tmp_path / "experts.safetensors")
    assert equal(collected, load_collection(tmp_path / "experts.safetensors"))


def changed(part, name, **change):
    """A fault of a file: an entry of a layer, or of the collection, set to another value."""

    def apply(collection):
        target = collection.layers[0] if part == "layer" else collection
        value = getattr(target, name)
        if "to" in change:
            value = change["to"](value)
        else:
            value.flatten()[change.get("at", 0)] = change["value"]
        setattr(target, name, value)

    return apply


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (changed("layer", "top_rows", value=10**6), "top_rows names something that is not there"),
        (changed("layer", "sample_positions", value=99), "sample_positions names something that is not there"),
        (changed("layer", "top_rows", value=-1), "top_values has a value without a row"),
        (changed("layer", "co_firing_ids", value=24), "co_firing_ids names"),
        (changed("layer", "promoted_ids", value=-2), "promoted_ids names"),
        (changed("layer", "maximum", value=float("nan")), "values that are not finite"),
        (changed("layer", "alignment", value=float("inf")), "alignment has values that are not finite"),
        (changed("layer", "top_windows", to=lambda t: t[..., 1:]), "top_windows has 24 entries where 25"),
        (changed("layer", "sample_windows", to=lambda t: t.int()), "sample_windows is torch.int32"),
        (changed("layer", "histogram", to=lambda t: t[:, 1:]), "histogram has 48 entries where 49"),
        (changed("layer", "frequency", to=lambda t: t[:7]), "where 7 were expected"),
        (changed("layer", "top_rows", to=lambda t: t.float()), "top_rows is torch.float32"),
        (changed("layer", "sample_values", to=lambda t: t[0]), "with 1 axes"),
        (changed("layer", "promoted_ids", to=lambda t: t[:, :0]), "promoted_ids has 0 entries"),
        (changed("layer", "promoted_values", to=lambda t: t[:, :3]), "ids and values of one shape"),
        (changed("layer", "similar_direction_values", to=lambda _: None), "ids and values of one shape"),
        (changed("layer", "top_values", to=lambda t: t[:, :0]), "top_values is empty"),
        (changed("layer", "histogram", value=-1), "histogram has numbers below 0"),
        (changed("layer", "maximum", value=-1.0), "maximum has numbers below 0"),
        (changed("all", "ids", value=-5), "rows.ids names"),
        (changed("all", "offsets", at=1, value=2**62), "offsets do not divide"),
        (changed("all", "offsets", at=slice(1, 3), value=torch.tensor([2**63 - 1, -2])), "offsets do not divide"),
        (changed("all", "offsets", to=lambda t: t[:0]), "offsets do not divide"),
        (changed("all", "domains", to=lambda _: ["a"]), "entries where 1 were expected"),
        (changed("all", "domains", to=lambda _: [1, 2]), "domains must be different names"),
        (changed("all", "domains", to=lambda _: ["a", "a"]), "domains must be different names"),
        (changed("all", "settings", to=lambda _: [3]), "settings in its header"),
        (changed("all", "layers", to=lambda _: {}), "has no layers"),
    ],
)  # fmt: skip
def test_a_file_of_nonsense_is_refused(collected, tmp_path, fault, message):
    fault(collected)
    save_collection(collected, tmp_path / "experts.safetensors")
    with pytest.raises(ValueError, match=message):
        load_collection(tmp_path / "experts.safetensors")


def test_files_that_are_none(collected, tmp_path, monkeypatch):
    path = tmp_path / "experts.safetensors"
    with pytest.raises(ValueError, match="there is no file"):
        load_collection(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"experts.safetensors is refused"):
        load_collection(path)
    monkeypatch.setattr("mxd.experts.collection_file.FORMAT_VERSION", "2")
    save_collection(collected, path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its format_version is '2'"):
        load_collection(path)
    save_collection(collected, path)
    monkeypatch.setattr("mxd.experts.collection_file.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="over 1,000 bytes"):
        load_collection(path)
