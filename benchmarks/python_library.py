"""The running interpreter's standard library as text."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from mxd.data.documents import DataError

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def python_library_files() -> Iterator[tuple[str, str]]:
    """Yield path and text of every source file of the standard library, in the order of the paths.

    Tests, installed packages, empty files and files that are not UTF-8 are left out.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if SKIPPED.intersection(inside.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield str(inside), text


def python_library_documents() -> Dataset:
    """Return one document a source file, see `python_library_files`.

    Returns:
        Rows `{"text": str, "domain": "code"}`, in the order of the files' paths.

    Raises:
        DataError: if the interpreter comes without its sources.
    """
    texts = [text for _, text in python_library_files()]
    if not texts:
        library = sysconfig.get_paths()["stdlib"]
        raise DataError(f"no Python sources under {library!r}; this interpreter has none to offer as text")
    return Dataset.from_dict({"text": texts, "domain": ["code"] * len(texts)})
