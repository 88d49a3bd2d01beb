"""Name the machine of a measurement, and write tables in Markdown."""

import platform
from collections.abc import Iterable, Sequence
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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown; cells are written as they are."""
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(head), *rest]) + "\n"
