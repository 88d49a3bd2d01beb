"""The explorer's data: text of tokens, contexts, and collections that are odd or of something else."""

from dataclasses import fields, replace

import pytest
import torch
from commands import run
from explorer_cases import hostile_tokenizer
from factories import byte_tokenizer, word_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mxd.base.capture import capture_mlps
from mxd.experts.collection_file import EXPERTS_NAME, save_collection
from mxd.experts.contexts import AROUND, TokenPieces
from mxd.explorer.server import ExplorerServer
from mxd.explorer.site import ExplorerSite
from mxd.jobs.explore import explore, explorer_site
from mxd.jobs.use_options import ExploreOptions
from mxd.modeling_mxd import MxDModel

ABOUT = {"name": "n", "about": "a", "warning": ""}


def sentencepiece_tokenizer():
    """As Llama's: spaces are ▁, and unknown characters are bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "a", "▁a", "n", "d", "▁and"]
    model = models.BPE({word: n for n, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def wordpiece_tokenizer():
    words = ["[UNK]", "un", "##believ", "##able", "the", "a", "##a", "國"]
    tokenizer = Tokenizer(models.WordPiece({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (byte_tokenizer(["hello"]), "a 国家 b naïve 🎉 done"),
        (byte_tokenizer(["hello"]), "日本語の文章です"),
        (sentencepiece_tokenizer(), "the and 国 a"),
        (wordpiece_tokenizer(), "the unbelievable a the 國"),
        (word_tokenizer(), "word3 word4 word3"),
        (hostile_tokenizer(), "<img src=x onerror=window.hacked=1> 國家"),
    ],
    ids=["bytes", "bytes-japanese", "sentencepiece", "wordpiece", "words", "hostile"],
)
def test_the_pieces_of_a_row_make_up_its_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenPieces(tokenizer).of(ids)
    assert len(pieces) == len(ids) and "".join(pieces).strip() == tokenizer.decode(ids).strip() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_incomplete_character_and_ids_of_no_token_are_no_error():
    tokenizer = byte_tokenizer(["hello"])
    ids = tokenizer("国", add_special_tokens=False)["input_ids"]
    assert len(TokenPieces(tokenizer).of([*ids[:-1], *ids, 10**6, -5, 2**31 - 1])) == 2 * len(ids) + 2


def text_of(context):
    return "".join(part if isinstance(part, str) else part[0] for part in context["parts"])


def all_paths(site):
    return {path: site.value(path) for path in site.paths()}


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_files_hold_every_expert_and_row(made, chunk):
    site = ExplorerSite(made.collection, made.tokenizer, ABOUT, chunk=chunk)
    values = all_paths(site)
    assert all(value is not None for value in values.values())
    experts = [
        page for path, value in values.items() if path.startswith("2/") and path[2].isdecimal() for page in value
    ]
    assert len(experts) == 24 and len(values["2/experts.json"]["frequency"]) == 24
    rows = [row for path, value in values.items() if path.startswith("rows/") for row in value]
    assert len(rows) == len(made.collection.documents)
    for page in experts:
        for group in page["contexts"]:
            for context in group["contexts"]:
                pieces = rows[context["row"]]
                active = [part for part in context["parts"] if isinstance(part, list)]
                assert context["position"] in {place for _, _, place in active}
                assert all(pieces[place] == text and 1 <= level <= 4 for text, level, place in active)
                assert text_of(context) in "".join(pieces)


@pytest.mark.parametrize(
    "path", ["", "/", "index", "../index.json", "2/24.json", "rows/999.json", "1/experts.json", "2/x.json",
             "99999999999999999999/experts.json", "2/-1.json", "rows/words.json",
             "rows/-1.json", "2/1.json\n", "rows/1.json/", "2/１.json", "2/1/1.json"]
)  # fmt: skip
def test_other_paths_are_none(made, path):
    assert ExplorerSite(made.collection, made.tokenizer, ABOUT).value(path) is None


def test_words_count_contexts(made):
    site = ExplorerSite(made.collection, made.tokenizer, ABOUT, chunk=128)
    words, pages = site.value("0/words.json"), site.value("0/0.json")
    pairs = dict(zip(words["word3"][::2], words["word3"][1::2], strict=True))
    for expert, page in enumerate(pages):
        contexts = page["contexts"][0]["contexts"]
        texts = [text_of(one).split() for one in contexts]
        assert pairs.get(expert, 0) == sum("word3" in text for text in texts)


def test_tokens_are_marked_by_the_coefficients_there(made):
    """Run a context's row through the model: the marks are where the expert is active, and as strong."""
    base, decomposition = AutoModelForCausalLM.from_pretrained(made.base), MxDModel.from_pretrained(made.folder)
    site, maximum = ExplorerSite(made.collection, made.tokenizer, ABOUT), made.collection.layers[2].maximum
    several = 0
    for expert in range(8):
        for context in site.value(f"2/{expert}.json")[0]["contexts"][0]["contexts"]:
            x = capture_mlps(base, [2], torch.tensor([made.collection.row(context["row"])]))[2][0]
            values, experts = decomposition.layer(2).encode(x)
            found = (values * (experts == expert)).sum(-1)[0].detach() / maximum[expert]
            here = range(max(1, context["position"] - AROUND), min(len(found), context["position"] + AROUND + 1))
            active = {place: level for _, level, place in filter(lambda part: isinstance(part, list), context["parts"])}
            assert active.keys() == {place for place in here if found[place] > 0}
            # The file has bins whose edges are a factor of √2 apart.
            assert all(4 * found[place] <= level <= 4 * 1.5 * found[place] + 1 for place, level in active.items())
            several += len(active) > 1
    assert several


def test_a_file_of_an_earlier_version_marks_one_token(made):
    site = ExplorerSite(changed(made.collection, top_windows=None, sample_windows=None), made.tokenizer, ABOUT)
    for group in site.value("2/3.json")[0]["contexts"]:
        assert all([isinstance(part, list) for part in one["parts"]].count(True) == 1 for one in group["contexts"])


def changed(collection, **changes):
    """A collection with other values in layer 2."""
    return replace(collection, layers={2: replace(collection.layers[2], **changes)})


def test_collections_with_nothing_in_them(made):
    layer = made.collection.layers[2]
    optional = {one.name: None for one in fields(layer) if one.default is None}
    empty = {
        name: torch.zeros_like(getattr(layer, name))
        for name in ("frequency", "maximum", "top_values", "sample_values", "histogram")
    }
    nowhere = {
        name: torch.full_like(getattr(layer, name), -1)
        for name in ("top_rows", "top_positions", "sample_rows", "co_firing_ids")
    }
    no_domains = {"domain_counts": layer.domain_counts[:, :0], "domain_tokens": layer.domain_tokens[:0]}
    for changes in (optional, empty | nowhere, empty | nowhere | optional | no_domains):
        collection = changed(made.collection, **changes)
        if changes.keys() & no_domains.keys():
            collection.domains = []
        site = ExplorerSite(collection, made.tokenizer, ABOUT)
        assert all(value is not None for value in all_paths(site).values())


def test_a_collection_of_another_vocabulary_is_shown(made):
    collection = changed(made.collection, promoted_ids=made.collection.layers[2].promoted_ids + 10**6)
    collection.ids = collection.ids + 10**6
    assert all(value is not None for value in all_paths(ExplorerSite(collection, made.tokenizer, ABOUT)).values())


def test_local_paths_are_not_shown(made):
    site = explorer_site(str(made.folder))
    assert site.about["about"].endswith("960 tokens of <u>.parquet")
    assert str(made.base.parent) not in site.about["about"]


def test_what_is_not_there(made, tmp_path):
    with pytest.raises(ValueError, match="neither a folder"):
        explorer_site(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_bytes((made.folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"has no experts.safetensors: `mxd experts FOLDER` makes it"):
        explorer_site(str(tmp_path))
    layers = made.collection.layers
    small = {
        one.name: getattr(layers[2], one.name)[:9]
        for one in fields(layers[2])
        if one.name not in ("tokens", "domain_tokens")
    }
    for collection in (
        replace(made.collection, layers={1: layers[2]}),
        replace(
            made.collection,
            layers={
                2: replace(
                    layers[2],
                    **{
                        **small,
                        **{
                            n: small[n].clamp(max=8)
                            for n in small
                            if n.endswith(("direction_ids", "modulation_ids", "firing_ids"))
                        },
                    },
                )
            },
        ),
    ):
        save_collection(collection, tmp_path / EXPERTS_NAME)
        with pytest.raises(ValueError, match="of another decomposition"):
            explorer_site(str(tmp_path))


def test_export_overwrites_nothing(made, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        explore(ExploreOptions(decomposition=str(made.folder), export=str(tmp_path)), progress=False)
    with pytest.raises(ValueError, match="not an empty folder"):
        explore(ExploreOptions(decomposition=str(made.folder), export=str(tmp_path / "mine.txt")), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_port_that_is_taken_is_named(made, served):
    with pytest.raises(ValueError, match="--port"):
        explore(ExploreOptions(decomposition=str(made.folder), port=served.server_port))


def test_the_command_serves_until_it_is_interrupted(made, monkeypatch):
    def interrupt(server):
        raise KeyboardInterrupt

    monkeypatch.setattr(ExplorerServer, "serve_forever", interrupt)
    code, output, error = run("explore", made.folder, "--port", "0")
    assert code == 0 and not error.strip().startswith("error")
    assert "Open http://127.0.0.1:" in output and "Ctrl-C" in output
