"""Name the machine of a measurement, and put tables into pages."""

import platform
from pathlib import Path

import torch


def machine(threads: int, device: str) -> str:
    """Return the processor or GPU, the threads and the versions, in words."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    name = torch.cuda.get_device_name() if device == "cuda" else processor
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {threads} thread{'s' if threads != 1 else ''}, {versions}"


def between_marks(mark: str, text: str) -> str:
    """Return a text between the marks of the benchmark that writes it."""
    return f"<!-- {mark}: begin -->\n{text}<!-- {mark}: end -->"


def write_between(page: Path, mark: str, text: str) -> None:
    """Replace the text between a benchmark's marks in a page.

    Raises:
        ValueError: when the page has no such marks.
    """
    begin, end = between_marks(mark, "\0").split("\0")
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, rest = rest.partition(end)
    if not (found and ended):
        raise ValueError(f"{page} has no {begin!r} with its end to write between")
    page.write_text(before + between_marks(mark, text) + rest, encoding="utf-8")
