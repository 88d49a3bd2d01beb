"""Documents of a few words for the tests of reading and packing: as rows, as files, and a tokenizer for them."""

from datasets import Dataset
from factories import byte_tokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "small", "boats"]


def document(number, words=40):
    return f"d{number} " + " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(words))


def texts(count, words=40):
    return [document(number, words) for number in range(count)]


def documents(count, words=40):
    return Dataset.from_dict({"text": texts(count, words)})


def build_tokenizer(**special):
    return byte_tokenizer(texts(20), **special)


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
