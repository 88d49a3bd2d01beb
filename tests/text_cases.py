"""What the tests of documents and of packing share: documents of a few words, a tokenizer of their own, files."""

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "small", "boats"]


def document(number, words=40):
    return f"d{number} " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def texts(count, words=40):
    return [document(number, words) for number in range(count)]


def documents(count, words=40):
    return Dataset.from_dict({"text": texts(count, words)})


def build_tokenizer(**special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(20), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special)


def ids_of(rows):
    return [row["input_ids"] for row in rows]


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def write_shards(folder, ending="jsonl", files=4, per_file=25, words=40):
    """Several files with documents of their own."""
    folder.mkdir(exist_ok=True)
    for file in range(files):
        numbers = range(file * per_file, (file + 1) * per_file)
        rows = Dataset.from_dict({"text": [document(n, words) for n in numbers], "url": [str(n) for n in numbers]})
        path = folder / f"{file}.{ending}"
        if ending == "parquet":
            rows.to_parquet(path)
        else:
            rows.to_json(path)
    return str(folder)
