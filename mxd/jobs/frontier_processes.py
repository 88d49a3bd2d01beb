"""The processes in which the points of a frontier are made: a few at a time, with one bar for all."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm.auto import tqdm

from .frontier_point import Point, clear
from .runs import Interrupted

_POLL_SECONDS = 0.5


class FrontierError(ValueError):
    """Points failed; the message says which, why, and what to do."""


def run_points(
    points: list[Point],
    finished: list[Point],
    *,
    jobs: int = 1,
    save: bool = True,
    progress: bool = True,
    after_each: Callable[[], object] = lambda: None,
) -> None:
    """Make points, each in a process of its own; one that fails does not keep the others from being made.

    Args:
        points: what to make, in this order.
        finished: the others, for the bar.
        jobs: how many at a time. Of several, each gets its share of the cores (`OMP_NUM_THREADS`).
        save: keep every point's decomposition.
        progress: show a bar: the training tokens of all points, those a second, and the time that is left.
        after_each: called whenever a point is finished.

    Raises:
        FrontierError: points failed.
        Interrupted: Ctrl-C or SIGTERM; points at work are lost.
    """
    waiting, running, failures = list(points), dict[str, tuple[Point, subprocess.Popen[bytes]]](), list[str]()
    done, everything = sum(point.tokens for point in finished), [*points, *finished]
    bar = tqdm(
        total=sum(point.tokens for point in everything), initial=done, unit="tok", unit_scale=True,
        disable=not progress, dynamic_ncols=True,
    )  # fmt: skip
    count = len(finished)
    try:
        with bar, _sigterm_interrupts():
            while waiting or running:
                while waiting and len(running) < jobs:
                    point = waiting.pop(0)
                    running[point.name] = (point, start(point, jobs))
                for name, (point, process) in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    if failure := _finish(point, process.returncode, save):
                        failures.append(failure)
                    else:
                        count, done = count + 1, done + point.tokens
                        after_each()
                bar.set_description(f"{count} of {len(everything)} points", refresh=False)
                bar.update(max(0, done + sum(_trained(point) for point, _ in running.values()) - bar.n))
                time.sleep(_POLL_SECONDS if running else 0)
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted with {count} of {len(everything)} points finished, which are kept: run the same command to "
            "go on"
        ) from None
    finally:
        for _, process in running.values():
            process.kill()
            process.wait()
        for point, _ in running.values():
            point.file(".progress").unlink(missing_ok=True)
    if failures:
        raise FrontierError(
            f"{len(failures)} of {len(points)} points failed, the others are kept: {'; '.join(failures)}; put it "
            "right, then run the same command to go on"
        )


def start(point: Point, jobs: int) -> "subprocess.Popen[bytes]":
    """Start the process of a point."""
    clear(point)
    environment = dict(os.environ)
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, _cores() // jobs))
    # The process runs this very library, also where it is not installed.
    home = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (home, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"{__package__}.frontier_point"]
    with point.file(".log").open("wb") as log:
        # A session of its own: a Ctrl-C at the terminal is for the parent, which ends it.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    assert process.stdin is not None  # it stays open: at its end, which a parent that is killed brings, a point ends
    process.stdin.write(point.job().encode() + b"\n")
    process.stdin.flush()
    return process


def _finish(point: Point, code: int, save: bool) -> str | None:
    """Tidy up after a point's process; returns what went wrong, if anything did."""
    point.file(".progress").unlink(missing_ok=True)
    folder = Path(point.options.output)
    if code == 0 and point.finished() is not None:
        if not save:
            shutil.rmtree(folder)
        return None
    lines = point.file(".log").read_text(errors="replace").strip().splitlines()
    reason = lines[-1] if lines else "it said nothing"
    ended = f"killed by signal {-code}, the memory may be full" if code < 0 else f"exit code {code}"
    return f"{point.name} ({ended}: {reason}, see {point.file('.log')})"


def _trained(point: Point) -> int:
    """Tokens that a point at work has trained on."""
    try:
        return int(float(point.file(".progress").read_text()) * point.tokens)
    except (OSError, ValueError):  # not yet there, or half written
        return 0


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM does as Ctrl-C does inside the block, so that no process is left behind; where signals can be handled."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
