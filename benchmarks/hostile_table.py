"""The hostile-input table: what strangers may put into a repo or a folder, by every way in, against a Hub on loopback.

    python benchmarks/hostile_table.py

The cases stand in tests/hub_cards/hostile_cases.py, what is measured and when one is broken in hostile.py beside it.
Takes about two minutes. Writes benchmarks/results/hostile.json, and the table into docs/sharing.md.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any
from weakref import WeakSet

from fault_table import DOCS, ROOT, TESTS
from pages import write_between
from tqdm.auto import tqdm

RESULTS = ROOT / "benchmarks" / "results" / "hostile.json"
MARK = "benchmarks/hostile_table.py"


class Bar(tqdm):  # type: ignore[type-arg]
    """A bar that those of the commands inside know nothing of: they would move the cursor for it."""

    _instances: WeakSet[Any] = WeakSet()


def run() -> list[dict[str, Any]]:
    """All cases by all their ways."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before any import of the client; the loopback Hub is let through
    sys.path[:0] = TESTS
    from hostile import HostileScene, run
    from hostile_cases import CASES
    from scenes import connected

    rows = []
    with tempfile.TemporaryDirectory() as folder, connected(Path(folder)) as hub:
        scene = HostileScene(hub, Path(folder))
        for way in dict.fromkeys(way for case in CASES for way in case.ways):
            run(scene, CASES[0], way)  # what is imported at first use is neither the case's memory nor its time
        for case in Bar(CASES, unit="case"):
            results = {way: run(scene, case, way) for way in case.ways}
            rows.append(
                {
                    "group": case.group,
                    "case": case.name,
                    "outcomes": {way: result.outcome.kind for way, result in results.items()},
                    "seconds": round(max(result.seconds for result in results.values()), 2),
                    "megabytes": round(max(result.bytes for result in results.values()) / 2**20),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown: a row for each case."""
    ways = list(dict.fromkeys(way for row in rows for way in row["outcomes"]))
    lines = ["| what | " + " | ".join(ways) + " | s | MB |", "|---" * (len(ways) + 3) + "|"]
    for row in rows:
        cells = [row["outcomes"].get(way, "") for way in ways]
        shown = [{"complete": "harmless"}.get(cell, cell) for cell in cells]
        lines.append(
            f"| {row['group']}: {row['case']} | "
            + " | ".join([*shown, f"{row['seconds']:.1f}", str(row["megabytes"])])
            + " |"
        )
    outcomes = [kind for row in rows for kind in row["outcomes"].values()]
    refused, harmless = outcomes.count("refused"), outcomes.count("complete")
    lines += ["", f"{len(rows)} cases, {len(outcomes)} runs: {refused} refused, {harmless} harmless, "]
    lines[-1] += (
        f"{len(outcomes) - refused - harmless} broken; at most {max(row['seconds'] for row in rows):.1f} s and "
    )
    lines[-1] += f"{max(row['megabytes'] for row in rows)} MB more of resident memory."
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all cases and write the table."""
    rows = run()
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    write_between(DOCS, MARK, table(rows))


if __name__ == "__main__":
    main()
