"""Faults of the Hub, and a runner that lets one call of an operation fail.

`record` runs an operation without faults and returns the calls that it made. `try_fault` runs it with one of them
failing. The outcome is broken, with the reason, unless all of this holds: the operation was complete, or was refused
with a message (a command: and exit code 1); the repo is as before, or complete; every file in the cache is as on the
server; a repeat without the fault, unless it passed and cost nothing, is complete.
"""

import contextlib
import io
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from factories import make_tiny_llama
from huggingface_hub import constants
from scenes import IDS, logits_of, save_decomposition, save_tokenizer, share_base
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mxd.cli import main as cli
from mxd.hub_cards import push_decomposition

REPO = "user/pulled"
FAULTS = {
    "401": {"status": 401},
    "403 gated": {"status": 403},
    "404": {"status": 404},
    "409": {"status": 409},
    "412": {"status": 412},
    "429": {"status": 429},
    "500": {"status": 500},
    "503": {"status": 503},
    "no reply": {"mode": "drop"},
    "half sent": {"mode": "half"},
    "reply lost": {"mode": "lost"},
}
PASSING = ("429", "500", "503", "no reply", "half sent", "reply lost")
TIMES = {"once": 1, "always": 10**6}
COMPLETE, REFUSED = "complete", "refused"


@dataclass(frozen=True)
class Call:
    method: str
    path: str  # with {repo} where an operation has a repo of its own, {commit} for commits, {object} for LFS objects

    def pattern(self, repo):
        path = self.path.replace("{repo}", repo)
        return "^" + re.escape(path).replace(r"\{commit\}", "[0-9a-f]{40}").replace(r"\{object\}", r"\w{64}") + "$"


@dataclass
class Outcome:
    kind: str
    message: str = ""


@dataclass(frozen=True)
class Operation:
    """`run(scene, repo)` gives an Outcome. `target`: of a push, "new" for a repo that is to be made, "old" for one that
    is there; of a pull, None."""

    name: str
    run: Callable
    target: str | None = None
    revision: str = "main"


class Scene:
    """A Hub with a base model and a pushed decomposition, the folder it was pushed from, and a cache."""

    def __init__(self, hub, folder):
        self.hub, self.cache, self.count = hub, Path(constants.HF_HUB_CACHE), 0
        self.folder, self.copy = folder / "decomposition", folder / "evaluated"
        model = make_tiny_llama()
        save_tokenizer(folder / "base")
        save_decomposition(model, share_base(hub, model, folder / "base"), self.folder)
        self.expected = logits_of(self.folder, model)
        shutil.copytree(self.folder, self.copy)
        push_decomposition(self.folder, REPO)

    def fresh(self, operation):
        """Name of the repo for the next run; nothing is cached, no object uploaded, no fault set."""
        self.hub.faults.clear()
        shutil.rmtree(self.cache, ignore_errors=True)
        if operation.target is None:
            return REPO
        self.hub.objects.clear()
        self.hub.repos.pop(f"user/pushed-{self.count}", None)
        self.count += 1
        repo = f"user/pushed-{self.count}"
        if operation.target == "old":  # with a card that is read, and weights that are replaced
            card = b"---\nlicense: mit\n---\nBy hand.\n"
            self.hub.create(repo, {"README.md": card, "model.safetensors": b"of another time"})
        return repo

    def is_complete(self, repo, revision="main"):
        have = self.hub.files(repo, revision)
        want = {path.name: path.read_bytes() for path in self.folder.glob("*.safetensors*")}
        got = {name: data for name, data in have.items() if ".safetensors" in name}
        return want == got and {"config.json", "modeling_mxd.py", "README.md"} <= have.keys()

    def is_untouched(self, repo):
        return repo not in self.hub.repos or len(self.hub.repos[repo].commits) == 1

    def odd_files(self):
        """Files in the cache that are not as on the server."""
        odd = []
        for path in self.cache.glob("models--*/snapshots/*/**/*"):
            if path.is_file():
                folder, _, commit, name = path.relative_to(self.cache).as_posix().split("/", 3)
                repo = folder.removeprefix("models--").replace("--", "/")
                if path.read_bytes() != self.hub.files(repo, commit).get(name):
                    odd.append(name)
        return odd


def command(*arguments):
    """Run `mxd …` in this process: exit code and all that it printed. An exception that leaves it is a traceback."""
    printed = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["mxd", *map(str, arguments)])
    wide = mock.patch.dict(os.environ, COLUMNS="300")
    with argv, wide, contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, printed.getvalue()


def by_command(*arguments):
    def run(scene, repo):
        code, printed = command(*(str(argument).format(repo=repo, **vars(scene)) for argument in arguments))
        if code == 0:
            return Outcome(COMPLETE, printed)
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        if code != 1 or len(errors) != 1 or "Traceback" in printed:
            return Outcome(f"broken: exit code {code}, {printed[-300:]!r}")
        return Outcome(REFUSED, errors[0])

    return run


def by_door(door, trust, registered=None):
    """`from_pretrained` as with the library installed, or (trust) as without it: by the repo's own code."""
    registered = not trust if registered is None else registered

    def run(scene, repo):
        try:
            with contextlib.nullcontext() if registered else _unregistered():
                model = door.from_pretrained(repo, trust_remote_code=trust)
        except Exception as error:
            return Outcome(REFUSED, f"{type(error).__name__}: {error}")
        if door is AutoModelForCausalLM:
            with torch.no_grad():
                logits = model(IDS).logits
            same = torch.equal(logits, scene.expected) or bool(logits.isnan().any())
            return Outcome(COMPLETE if same else "broken: other logits")
        return Outcome(COMPLETE if len(model.layers) == 2 else "broken: not all layers")

    return run


@contextlib.contextmanager
def _unregistered():
    """The classes of this library unknown to transformers, as where it is not installed."""
    mappings = [CONFIG_MAPPING, AutoModel._model_mapping, AutoModelForCausalLM._model_mapping]
    before = [dict(mapping._extra_content) for mapping in mappings]
    for mapping in mappings:
        mapping._extra_content.clear()
    try:
        yield
    finally:
        for mapping, content in zip(mappings, before, strict=True):
            mapping._extra_content.clear()
            mapping._extra_content.update(content)


PUSH = ("push", "{folder}", "{repo}")
OPERATIONS = [
    Operation("mxd push", by_command(*PUSH), "new"),
    Operation("mxd push --revision", by_command(*PUSH, "--revision", "try"), "old", "try"),
    Operation("mxd show", by_command("show", "{repo}")),
    Operation("mxd search", by_command("search")),
    Operation("mxd evaluate", by_command("evaluate", "{copy}", "--tokens", "64", "--context-length", "16")),
    Operation("AutoModel", by_door(AutoModel, False)),
    Operation("AutoModelForCausalLM", by_door(AutoModelForCausalLM, False)),
    Operation("AutoModelForCausalLM without the library", by_door(AutoModelForCausalLM, True)),
]


def record(scene, operation):
    """The calls of an operation that nothing disturbs."""
    repo = scene.fresh(operation)
    scene.hub.requests.clear()
    outcome = operation.run(scene, repo)
    assert outcome.kind == COMPLETE, outcome
    own = {repo: "{repo}"} if operation.target else {}
    named = [(method, _replaced(path, own)) for method, path, _ in scene.hub.requests]
    calls = [Call(method, path) for method, path in named if path != "/api/agent-harnesses"]
    return list(dict.fromkeys(calls))


def _replaced(path, own):
    for name, mark in own.items():
        path = path.replace(name, mark)
    return re.sub("[0-9a-f]{40}", "{commit}", re.sub("[0-9a-f]{64}", "{object}", path))


def try_fault(scene, operation, call, fault, times):
    """Run an operation with a failing call: what came of it, or why it is broken."""
    repo = scene.fresh(operation)
    scene.hub.fail(call.method, call.pattern(repo), times=TIMES[times], **FAULTS[fault])
    outcome = operation.run(scene, repo)
    if wrong := _wrong(scene, operation, repo, outcome):
        return Outcome(f"broken: {wrong}", outcome.message)
    if times == "once" and outcome.kind == COMPLETE:
        return outcome  # as good as undisturbed
    scene.hub.faults.clear()
    again = operation.run(scene, repo)
    if again.kind != COMPLETE or (wrong := _wrong(scene, operation, repo, again)):
        return Outcome(f"broken: a repeat is {again.kind}, {wrong}", again.message)
    return outcome


def _wrong(scene, operation, repo, outcome):
    """What is wrong with an outcome, or nothing."""
    wrong = []
    if outcome.kind not in (COMPLETE, REFUSED):
        wrong.append(outcome.kind)
    if outcome.kind == REFUSED and not outcome.message.strip():
        wrong.append("no message")
    if scene.hub.token in outcome.message:
        wrong.append("the token is in the message")
    if operation.target:
        complete = scene.is_complete(repo, operation.revision)
        if not complete and (outcome.kind == COMPLETE or not scene.is_untouched(repo)):
            wrong.append("the repo is half updated")
        if repo in scene.hub.repos and len(scene.hub.repos[repo].commits) > 3:  # ours, and that of the repeat
            wrong.append("a commit was made twice")
    if odd := scene.odd_files():
        wrong.append(f"{odd[0]} in the cache is not as on the server")
    return "; ".join(wrong)
