"""Documents of a few words for the tests of reading and packing: as rows, as files, and a tokenizer for them."""

import json

import pyarrow as pa
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


def write(folder, ending, files=4, per_file=30):
    """Write files of an ending, each with documents of its own."""
    folder.mkdir()
    for file in range(files):
        found = [document(number) for number in range(file * per_file, (file + 1) * per_file)]
        path, rows = folder / f"{file}.{ending}", Dataset.from_dict({"text": found})
        if ending == "txt":
            for number, text in enumerate(found[:10]):
                (folder / f"{file}-{number}.txt").write_text(text)
        elif ending == "parquet":
            rows.to_parquet(path, batch_size=7)
        elif ending == "arrow":
            with pa.ipc.new_stream(str(path), rows.data.table.schema) as stream:
                stream.write_table(rows.data.table, max_chunksize=8)
        elif ending in ("csv", "tsv"):
            rows.to_csv(path, sep="," if ending == "csv" else "\t", index=False)
        else:
            to_json(rows, path)
    return str(folder)


def to_json(rows, path):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows.to_list(), indent=1))
    else:
        rows.to_json(path, compression="gzip" if path.suffix == ".gz" else None)
