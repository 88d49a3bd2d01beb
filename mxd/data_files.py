"""Names of data files: which endings are read, and which names are never a model or a Hub dataset."""

FORMATS = (".parquet", ".arrow", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".md", ".rst", ".py")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
DATA_ENDINGS = tuple(ending + packed for ending in FORMATS for packed in ("", *COMPRESSIONS))

# They cannot be read, but a name that ends so is a file's.
_OTHER_ENDINGS = (
    *COMPRESSIONS, ".7z", ".avro", ".doc", ".docx", ".epub", ".feather", ".htm", ".html", ".log", ".lz4", ".npy",
    ".npz", ".orc", ".pdf", ".pkl", ".rar", ".rtf", ".sqlite", ".tar", ".tex", ".tgz", ".xls", ".xlsx", ".xml", ".zip",
)  # fmt: skip


def is_data_file(name: str) -> bool:
    """Return whether a name is that of a data file, also of one that is missing or cannot be read."""
    return name.lower().endswith((*DATA_ENDINGS, *_OTHER_ENDINGS))


def split_ending(name: str) -> tuple[str, str]:
    """Return format and compression of a file's name, lower case: `(".jsonl", ".gz")`; empty if they are not known."""
    for ending in FORMATS:
        for packed in ("", *COMPRESSIONS):
            if name.lower().endswith(ending + packed):
                return ending, packed
    return "", ""
