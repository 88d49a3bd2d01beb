"""The fault table: every fault at every call that push and pull make, against a Hub on loopback.

    python benchmarks/fault_table.py [--jobs 2]

What an operation is, what faults there are and when a cell is broken stands in tests/hub_cards/faults.py. An operation
is a process of its own, `--jobs` at a time; all of them take about 15 minutes on one core. Writes
benchmarks/results/faults.json, and the table into docs/sharing.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pages import write_between

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
DOCS = ROOT / "docs" / "sharing.md"
MARK = "benchmarks/fault_table.py"
TESTS = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "hub_cards")]  # the first, since tests/ has rooms too


def run(name: str) -> dict[str, Any]:
    """All cells of one operation."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the client; the loopback Hub is let through
    sys.path[:0] = TESTS
    from faults import FAULTS, OPERATIONS, TIMES, Scene, record, try_fault
    from scenes import connected
    from tqdm.auto import tqdm

    operation = next(operation for operation in OPERATIONS if operation.name == name)
    rows, messages = [], {}
    with tempfile.TemporaryDirectory() as folder, connected(Path(folder)) as hub:
        scene = Scene(hub, Path(folder))
        for call in tqdm(record(scene, operation), desc=name):
            cells = {}
            for fault in FAULTS:
                outcomes = [try_fault(scene, operation, call, fault, times) for times in TIMES]
                cells[fault] = ", ".join(outcome.kind for outcome in outcomes)
                if outcomes[-1].message and fault not in messages:
                    messages[fault] = _without_address(outcomes[-1].message, hub.url)
            rows.append({"call": f"{call.method} {call.path}", **cells})
    return {"name": name, "calls": rows, "messages": messages}


def _without_address(message: str, url: str) -> str:
    return message.replace(url, "http://127.0.0.1:PORT").replace(tempfile.gettempdir(), "TMP")[:400]


def table(results: dict[str, Any]) -> str:
    """The results as Markdown: for each operation and fault, how many calls of which outcome."""
    lines = [
        "| operation, its calls | fault | once: complete | refused | always: complete | refused |",
        "|---|---|---|---|---|---|",
    ]
    kinds: list[str] = []
    for operation in results["operations"]:
        calls = operation["calls"]
        for number, fault in enumerate(name for name in calls[0] if name != "call"):
            once, always = zip(*(call[fault].split(", ") for call in calls), strict=True)
            counts = [outcomes.count(kind) for outcomes in (once, always) for kind in ("complete", "refused")]
            name = f"{operation['name']}, {len(calls)}" if number == 0 else ""
            lines.append("| " + " | ".join(map(str, (name, fault, *counts))) + " |")
            kinds += once + always
    complete, refused = kinds.count("complete"), kinds.count("refused")
    broken = len(kinds) - complete - refused
    return (
        "\n".join([*lines, "", f"{len(kinds):,} cells: {complete:,} complete, {refused:,} refused, {broken} broken."])
        + "\n"
    )


def main() -> None:
    """Run all operations and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("OPERATION", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        Path(options.one[1]).write_text(json.dumps(run(options.one[0])))
        return
    sys.path[:0] = TESTS
    from faults import OPERATIONS

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        files = [Path(folder) / f"{number}.json" for number in range(len(OPERATIONS))]
        commands = [
            [sys.executable, __file__, "--one", operation.name, str(file)]
            for operation, file in zip(OPERATIONS, files, strict=True)
        ]
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        results = {"operations": [json.loads(file.read_text()) for file in files]}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write_between(DOCS, MARK, table(results))


if __name__ == "__main__":
    main()
