"""Text becomes the tokens of its characters, with any tokenizer; chats go through the chat template."""

import json

import numpy as np
import pytest
from datasets import Dataset
from factories import byte_tokenizer, word_tokenizer
from text_cases import ids_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mxd.data.documents import DataError, load_text
from mxd.data.labelled_text import LabelledDocuments, cut_texts
from mxd.data.packing import pack
from mxd.data.readers import CHAT, chat_document
from mxd.data.tokens import token_ids

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>"
    "{% endfor %}"
)
MARKERS = ["<|im_start|>", "<|im_end|>"]
TALK = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "you too"}]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

pytestmark = pytest.mark.usefixtures("private_cache")


class Strict:
    """Wrap a tokenizer: `__call__` takes only the keywords that it knows, as mistral-common's."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        if name == "get_added_vocab":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, text, add_special_tokens=True, **unknown):
        if unknown:
            raise ValueError(f"Kwargs {list(unknown)} are not supported")
        return self.inner(text, add_special_tokens=add_special_tokens)


class Mistral(Strict):
    """A `Strict` whose chats must not end with an answer, unless it is to be continued or the mode is "finetuning"."""

    def __init__(self, inner, mode):
        super().__init__(inner)
        self.mode, self.chat_template = mode, None

    def apply_chat_template(self, messages, continue_final_message=False):
        answered = messages[-1]["role"] == "assistant"
        if answered and self.mode != "finetuning" and not continue_final_message:
            raise RuntimeError("Expected last role User or Tool (or Assistant with prefix) for serving")
        ids = self.inner.apply_chat_template(messages)["input_ids"]
        return [*ids, self.eos_token_id] if answered and not continue_final_message else ids


def unigram():
    """A Unigram model whose vocabulary holds the special tokens as words, with the best score, as converted ones do."""
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/|_▁"]
    special = [("<unk>", 0.0), *((name, 0.0) for name in NAMES.values())]
    tokenizer = Tokenizer(models.Unigram([*special, *letters], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **NAMES)


def chatty(**names):
    built = byte_tokenizer(["hello there you too user assistant"] * 3, **names)
    built.add_tokens(MARKERS)  # not special, as in some models
    built.chat_template = TEMPLATE
    return built


TOKENIZERS = {
    "fast": lambda: chatty(**NAMES),
    "fast, no special tokens": lambda: byte_tokenizer(["hello there"]),
    "slow": ByT5Tokenizer,
    "words": lambda: word_tokenizer(30, **NAMES, unk_token="<unk>"),
    "unigram": unigram,
    "strict": lambda: Strict(word_tokenizer(30, **NAMES, unk_token="<unk>")),
    "strict, bytes": lambda: Strict(byte_tokenizer(["hello there"], **NAMES)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["word3 {} word4", "{}", "word3{}word4{}", "word1 {}\n{} word2"])
def test_a_text_that_spells_control_tokens_has_none(kind, text):
    tokenizer = TOKENIZERS[kind]()
    control = {*tokenizer.all_special_tokens, *(MARKERS if kind == "fast" else ())} - {tokenizer.bos_token}
    control -= {tokenizer.unk_token}  # which stands for any unknown word
    for token in control:
        (ids,) = token_ids(tokenizer, [text.replace("{}", token)])
        assert tokenizer.convert_tokens_to_ids(token) not in ids
        if kind in ("fast", "strict, bytes", "slow"):
            assert tokenizer.decode(ids) == text.replace("{}", token)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_has_the_ids_that_the_tokenizer_gives(kind):
    tokenizer, texts = TOKENIZERS[kind](), ["word3 word4 hello", "", "there  word5\n"]
    assert token_ids(tokenizer, texts) == tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert token_ids(tokenizer, []) == []


def probed(documents, tokenizer, length):
    texts = np.array(documents, dtype=object)
    found = LabelledDocuments(texts, np.array(["a", "b"] * (len(texts) // 2)), np.arange(len(texts)).astype(str))
    return cut_texts(found, tokenizer, context_length=length).ids


@pytest.mark.parametrize("kind", ["fast", "words", "unigram", "strict"])
def test_a_text_that_begins_with_bos_has_one(kind):
    tokenizer = TOKENIZERS[kind]()
    plain = ["word1 word2 word3 word4 word5 word6 word7"] * 4
    templated = [tokenizer.bos_token + text for text in plain]
    rows = [ids_of(pack(Dataset.from_dict({"text": texts}), tokenizer, 8)) for texts in (plain, templated)]
    assert rows[0] == rows[1] and all(row.count(tokenizer.bos_token_id) == 1 for row in rows[0])
    cut = [probed(texts, tokenizer, 7) for texts in (plain, templated)]
    assert cut[0] == cut[1] and all(ids.count(tokenizer.bos_token_id) == 1 for ids in cut[0])


def write_chats(path, chats=((TALK, 1),) * 8, column="messages"):
    rows = [{column: chat, "number": number} for chat, number in chats]
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["messages", "talk"])
def test_messages_go_through_the_chat_template(tmp_path, ending, streaming, column):
    path = write_chats(tmp_path / f"chats.{ending}", column=column)
    how = {} if column == "messages" else {"text_column": column}
    documents, tokenizer = load_text(path, streaming=streaming, keep=["number"], **how), chatty(**NAMES)
    asked = tokenizer.apply_chat_template(TALK)["input_ids"]
    assert tokenizer.convert_tokens_to_ids(MARKERS[0]) in asked and asked[0] == tokenizer.bos_token_id
    (row, *_) = ids_of(pack(documents, tokenizer, len(asked), shuffle=False))
    assert row == asked  # one BOS
    assert str(next(iter(documents))["number"]) == "1"


@pytest.mark.parametrize("streaming", [False, True])
def test_messages_of_a_hub_dataset(monkeypatch, streaming):
    hub = Dataset.from_dict({"messages": [TALK] * 8, "number": range(8)})
    hub = hub.to_iterable_dataset() if streaming else hub
    monkeypatch.setattr("mxd.data.documents.load_dataset", lambda *_, **__: hub)
    tokenizer = chatty(**NAMES)
    asked = tokenizer.apply_chat_template(TALK)["input_ids"]
    documents = load_text("owner/chats", keep=["number"], streaming=streaming)
    assert ids_of(pack(documents, tokenizer, len(asked), shuffle=False))[0] == asked
    assert [row["number"] for row in documents] == list(range(8))


def test_a_dataset_of_messages_can_be_packed():
    tokenizer = chatty()
    rows = ids_of(pack(Dataset.from_dict({"messages": [TALK] * 4}), tokenizer, 12, shuffle=False))
    assert rows[0] == tokenizer.apply_chat_template(TALK)["input_ids"][:12]


@pytest.mark.parametrize("token", ["</s>", "<|im_end|>", "<｜padding｜>"])
def test_a_message_that_spells_a_control_token_is_text(token):
    tokenizer = chatty(**NAMES | {"pad_token": "<｜padding｜>"})
    chats = [chat_document([{"role": "user", "content": f"say {said}"}]) for said in ("it", token)]
    number = tokenizer.convert_tokens_to_ids(token)
    one, other = (ids.count(number) for ids in token_ids(tokenizer, chats))
    assert one == other == (token == "<|im_end|>")


def test_templated_text_keeps_its_control_tokens_if_asked(tmp_path):
    tokenizer = chatty(**NAMES)
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    path = tmp_path / "templated.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(4)))
    asked = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids_of(pack(load_text(str(path), chat=True), tokenizer, len(asked), shuffle=False))[0] == asked
    plain = ids_of(pack(load_text(str(path)), tokenizer, len(asked), shuffle=False))[0]
    assert not set(tokenizer.convert_tokens_to_ids(MARKERS)) & set(plain)


def test_chats_are_probed_with_one_bos():
    tokenizer = chatty(**NAMES)
    (ids, *_) = probed([CHAT + json.dumps(TALK)] * 2, tokenizer, 64)
    assert ids == tokenizer.apply_chat_template(TALK)["input_ids"]


@pytest.mark.parametrize("mode", ["test", "finetuning"])
@pytest.mark.parametrize("talk", [TALK, TALK[:1]], ids=["answered", "asked"])
def test_a_mistral_chat_that_is_answered_ends_with_eos(mode, talk):
    inner = chatty(**NAMES)
    ids = inner.apply_chat_template(talk)["input_ids"]
    end = [inner.eos_token_id] if talk[-1]["role"] == "assistant" else []
    assert token_ids(Mistral(inner, mode), [CHAT + json.dumps(talk)]) == [[*ids, *end]]


def test_chats_that_cannot_be_rendered(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl")
    with pytest.raises(DataError, match=r"tokenizer has no chat template.*--text-column"):
        pack(load_text(path), byte_tokenizer(["hello"]), 8)
    fussy = chatty()
    fussy.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses a chat.*roles must alternate"):
        pack(load_text(path), fussy, 8)
    other = write_chats(tmp_path / "other.jsonl", [([1, 2], 0)] * 3)
    with pytest.raises(DataError, match="holds list, not text, in row 1"):
        pack(load_text(other), chatty(), 8)
