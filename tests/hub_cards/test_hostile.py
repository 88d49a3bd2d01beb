"""What a stranger may put into a repo or a folder is refused or harmless, by every way in.

A case must be refused (a command: exit code 1 and one message) or, by the ways that it names as harmless, change
nothing. It is broken if it takes over `SECONDS`, allocates over `BYTES`, runs code or reads a pickle (which would leave
a canary), prints a traceback or a character that steers a terminal.
"""

import contextlib
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
from faults import COMPLETE, REFUSED, REPO, Outcome, Scene, by_command, by_door
from hostile_cases import CASES, CODE, EVALUATE, EVIL, LM, MODEL, PICKLE, PUSH, SEARCH, SHOW
from scenes import connected
from transformers import AutoModel, AutoModelForCausalLM

SECONDS, BYTES = 10, 2**30


class HostileScene(Scene):
    """A scene with a repo and a folder that hold a case, and a canary that hostile code would leave."""

    def __init__(self, hub, folder):
        super().__init__(hub, folder)
        self.place, self.canary = folder / "case", folder / "canary"
        os.environ["MXD_CANARY"] = str(self.canary)
        self.good = dict(hub.files(REPO))
        self.known = set(hub.repos)

    def set(self, case):
        """Put a case into the repo EVIL and into a folder."""
        for name in set(self.hub.repos) - self.known:
            del self.hub.repos[name]
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        self.canary.unlink(missing_ok=True)
        files = dict(self.good)
        for name, content in case.files.items():
            files[name] = content(self.good[name]) if callable(content) else content
        files = {name: content for name, content in files.items() if content is not None}
        for name, content in files.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(content)
        if case.group == "card":  # of the repo that is pushed over, not of the folder
            (self.place / "README.md").unlink()
            self.hub.create("user/out", {"README.md": files["README.md"]})
        self.hub.create(EVIL, files)
        for name, content in case.repos.items():
            self.hub.create(name, content)


RUNS = {
    SHOW: by_command("show", EVIL),
    SEARCH: by_command("search"),
    PUSH: by_command("push", "{place}", "user/out"),
    EVALUATE: by_command("evaluate", "{place}", "--tokens", "64", "--context-length", "16"),
    MODEL: by_door(AutoModel, False),
    LM: by_door(AutoModelForCausalLM, False),
}


def run(scene, case, way):
    scene.set(case)
    with _limited() as used:
        started = time.thread_time()  # what the machine and the loopback Hub's threads do is not the case's
        outcome = RUNS[way](scene, EVIL)
        seconds = time.thread_time() - started
    if outcome.kind in (COMPLETE, REFUSED) and (wrong := _wrong(scene, case, way, outcome, seconds, used["bytes"])):
        outcome = Outcome(f"broken: {wrong}", outcome.message)
    return outcome


def _wrong(scene, case, way, outcome, seconds, used):
    wrong = []
    if seconds > SECONDS:
        wrong.append(f"it took {seconds:.1f} s")
    if used > BYTES or "MemoryError" in outcome.message or "can't allocate memory" in outcome.message:
        wrong.append(f"it allocated {used / 2**20:.0f} MB")
    if scene.canary.exists() or "code was run" in outcome.message:
        wrong.append("its code was run")
    if way.startswith("mxd ") and any(not c.isprintable() and c not in "\n\r\t" for c in outcome.message):
        wrong.append("it steers the terminal")
    if way == SEARCH and REPO not in outcome.message:
        wrong.append("others are not found")
    if way == PUSH and outcome.kind == REFUSED and len(getattr(scene.hub.repos.get("user/out"), "commits", [1])) > 1:
        wrong.append("it was pushed")
    if way == PUSH and outcome.kind == COMPLETE:
        pushed = scene.hub.files("user/out")
        if PICKLE in pushed.values() or CODE in pushed.values():
            wrong.append("code or pickles of a stranger were pushed on")
    if outcome.kind == REFUSED and way.startswith("mxd ") and case.says not in outcome.message:
        wrong.append(f"the message does not say {case.says!r}")
    return "; ".join(wrong)


@contextlib.contextmanager
def _limited():
    """At most `BYTES` more address space inside the block; gives what the resident memory rose by."""
    used = {"bytes": 0}
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
    before = _status("VmRSS")
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + BYTES, hard))
    try:
        yield used
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        used["bytes"] = max(0, _status("VmHWM") - before)


def _status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    with connected(folder) as hub:
        yield HostileScene(hub, folder)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number].group}: {CASES[number].name}")
def test_it_is_refused_or_harmless(scene, number):
    case = CASES[number]
    outcomes = {way: run(scene, case, way) for way in case.ways}
    expected = {way: COMPLETE if way in case.harmless else REFUSED for way in case.ways}
    assert {way: outcome.kind for way, outcome in outcomes.items()} == expected, outcomes
