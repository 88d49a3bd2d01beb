"""Labelled problems for `benchmarks/probing.py`, from the corpus (parquet files with the columns domain, title, author,
year, text) and the running interpreter's standard library."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from python_library import python_library_files

from mxd.data.labelled_text import LabelledDocuments

ERAS = {"1790–1849": range(1790, 1850), "1850–1899": range(1850, 1900), "1900–1949": range(1900, 1950),
        "1950–2021": range(1950, 2022)}  # fmt: skip
# Presidents since both parties exist, without Andrew Johnson, who was elected on a ticket of both.
PARTIES = {
    "Democrat": ("Grover Cleveland", "Woodrow Wilson", "Franklin D Roosevelt", "Harry S Truman", "John F Kennedy",
                 "Lyndon B Johnson", "Jimmy Carter", "William J Clinton", "Barack Obama", "Joseph R Biden",
                 "James Buchanan"),
    "Republican": ("Abraham Lincoln", "Ulysses S Grant", "Rutherford B Hayes", "Chester A Arthur", "Benjamin Harrison",
                   "William Mc Kinley", "Theodore Roosevelt", "William H Taft", "Warren G Harding", "Calvin Coolidge",
                   "Herbert Hoover", "Dwight D Eisenhower", "Richard Nixon", "Gerald R Ford", "Ronald Reagan",
                   "George Bush", "George W Bush", "Donald J Trump"),
}  # fmt: skip
PRESIDENTS = 6
# The division of the First Folio of 1623; plays that are not in it are left out.
PLAYS = {
    "comedy": ("the-tempest", "two-gentlemen-of-verona", "the-merry-wives-of-windsor", "measure-for-measure",
               "the-comedy-of-errors", "much-ado-about-nothing", "love-s-labours-lost", "a-midsummer-night-s-dream",
               "the-merchant-of-venice", "as-you-like-it", "the-taming-of-the-shrew", "all-s-well-that-ends-well",
               "twelfth-night", "a-winter-s-tale"),
    "history": ("king-john", "richard-ii", "henry-iv-part-1", "henry-iv-part-2", "henry-v", "henry-vi-part-1",
                "henry-vi-part-2", "henry-vi-part-3", "richard-iii", "henry-viii"),
    "tragedy": ("troilus-and-cressida", "coriolanus", "titus-andronicus", "romeo-and-juliet", "timon-of-athens",
                "julius-caesar", "macbeth", "hamlet", "king-lear", "othello", "antony-and-cleopatra", "cymbeline"),
}  # fmt: skip
# First part of a module's path.
CODE = {
    "compiling": ("ast", "dis", "tokenize", "lib2to3", "importlib", "inspect", "symtable", "codeop", "compileall",
                  "py_compile", "zipimport", "opcode"),
    "concurrency": ("asyncio", "concurrent", "multiprocessing", "threading", "queue", "sched", "subprocess",
                    "selectors"),
    "graphics": ("tkinter", "idlelib", "turtle", "turtledemo"),
    "markup": ("html", "xml", "json", "csv", "re", "string", "textwrap", "difflib", "configparser", "plistlib",
               "tomllib"),
    "network": ("http", "urllib", "xmlrpc", "wsgiref", "imaplib", "ssl", "nntplib", "smtplib", "ftplib", "socket",
                "socketserver", "poplib", "telnetlib", "smtpd"),
}  # fmt: skip
REGION = re.compile(r"^Map references: (.*)\n", re.MULTILINE)
MIN_COUNTRIES = 10
MIN_DOCSTRINGS = 500  # characters

Row = tuple[str, str, str]
"""Text, label, group."""


def problems(corpus: Path) -> dict[str, LabelledDocuments]:
    """Return every problem by its name; groups are documents."""
    rows = [row for path in sorted(corpus.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    domains: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        domains.setdefault(row["domain"], []).append(row)
    speeches, plays, countries = (domains[name] for name in ("speeches", "plays", "factbook"))
    library = list(python_library_files())
    frequent = Counter(row["author"] for row in speeches).most_common()
    presidents = [name for name, _ in sorted(frequent, key=lambda item: (-item[1], item[0]))[:PRESIDENTS]]
    return {
        "domain": made_of(
            [
                *((row["text"], row["domain"], row["title"]) for row in rows),
                *((text, "Python", path) for path, text in library),
            ]
        ),
        "era": made_of((row["text"], _key(ERAS, int(row["year"])), row["title"]) for row in speeches),
        "party": made_of((row["text"], _key(PARTIES, row["author"]), row["title"]) for row in speeches),
        "president": made_of(
            (row["text"], row["author"], row["title"]) for row in speeches if row["author"] in presidents
        ),
        "kind of play": made_of((row["text"], _key(PLAYS, row["title"]), row["title"]) for row in plays),
        "region": regions(countries),
        "kind of code": made_of((text, _key(CODE, re.split(r"[/.]", path)[0]), path) for path, text in library),
        "docstring or code": docstrings(library),
    }


def made_of(rows: Iterator[tuple[str, str | None, str]] | list[Row]) -> LabelledDocuments:
    """Return documents from (text, label, group), without those that have no label."""
    kept = [row for row in rows if row[1] is not None]
    texts, labels, groups = zip(*kept, strict=True)
    return LabelledDocuments(list(texts), np.array(labels), np.array(groups))


def _key(table: dict[str, object], value: object) -> str | None:
    return next((key for key, values in table.items() if value in values), None)  # type: ignore[operator]


def regions(countries: list[dict[str, str]]) -> LabelledDocuments:
    """Return each country's introduction and history, labelled with the region that its profile names further down."""
    found = [(row, match[1]) for row in countries if (match := REGION.search(row["text"]))]
    counts = Counter(region for _, region in found)
    return made_of(
        [
            (row["text"].partition("\nGeography\n")[0], region, row["title"])
            for row, region in found
            if counts[region] >= MIN_COUNTRIES
        ]
    )


def docstrings(library: list[tuple[str, str]]) -> LabelledDocuments:
    """Return each file's docstrings, and its code without docstrings and comments, in one group."""
    rows: list[Row] = []
    for path, text in library:
        try:
            tree = ast.parse(text)
        except SyntaxError:  # lib2to3 and others carry broken examples
            continue
        found = []
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            docstring = ast.get_docstring(node)
            if docstring is not None:
                found.append(docstring)
                node.body = node.body[1:] or [ast.Pass()]
        said = "\n\n".join(found)
        if len(said) >= MIN_DOCSTRINGS:
            rows += [(said, "docstring", path), (ast.unparse(tree), "code", path)]
    return made_of(rows)
