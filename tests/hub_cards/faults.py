"""The fault table: every fault at every call of push and pull, as data and one runner.

`record` runs an operation once without faults and notes the calls it made; `try_fault` runs it with one of them failing
and judges what came of it. A cell is broken, with the reason, unless the operation was complete, or refused with a
message (and exit code 1, where it is a command), the repo as before or complete, every file in the cache as on the
server, and a repeat without the fault complete.
"""

import contextlib
import io
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from huggingface_hub import constants
from transformers import AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mxd import cli

BASE, REPO = "user/base", "user/pulled"
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
    name: str
    run: Callable  # (scene, repo) → Outcome
    pushes: bool = False


class Scene:
    """A Hub with a base model and a pushed decomposition, the folder it was pushed from, and a cache."""

    def __init__(self, hub, folder, expected, cache):
        self.hub, self.folder, self.expected, self.cache, self.count = hub, folder, expected, Path(cache), 0

    def fresh(self, operation):
        """Name of the repo for the next run; nothing is cached, no object uploaded, no fault set."""
        self.hub.faults.clear()
        shutil.rmtree(self.cache, ignore_errors=True)
        if not operation.pushes:
            return REPO
        self.hub.objects.clear()
        self.count += 1
        repo = f"user/pushed-{self.count}"
        # With a card that is read, and figures that are replaced: a second push has more calls than a first.
        files = {"README.md": b"---\nlicense: mit\n---\nBy hand.\n", "model.safetensors": b"of another time"}
        self.hub.create(repo, files)
        return repo

    def is_complete(self, repo, revision="main"):
        have = self.hub.files(repo, revision)
        want = {path.name: path.read_bytes() for path in self.folder.glob("*.safetensors*")}
        got = {name: data for name, data in have.items() if ".safetensors" in name}
        return want == got and {"config.json", "modeling_mxd.py", "README.md"} <= have.keys()

    def is_untouched(self, repo):
        return len(self.hub.repos[repo].commits) == 1

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
    argv = ["mxd", *map(str, arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, printed.getvalue()


def by_command(*arguments):
    def run(scene, repo):
        code, printed = command(*(str(argument).format(repo=repo, folder=scene.folder) for argument in arguments))
        if code == 0:
            return Outcome(COMPLETE, printed)
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        if code != 1 or len(errors) != 1 or "Traceback" in printed:
            return Outcome(f"broken: exit code {code}, {printed[-300:]!r}")
        return Outcome(REFUSED, errors[0])

    return run


def by_door(door, trust):
    """`from_pretrained` as with the library installed, or (trust) as without it: by the repo's own code."""

    def run(scene, repo):
        try:
            with _unregistered() if trust else contextlib.nullcontext():
                model = door.from_pretrained(repo, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            return Outcome(REFUSED, str(error))
        except Exception as error:
            return Outcome(REFUSED, f"{type(error).__name__}: {error}")
        if door is AutoModelForCausalLM:
            with torch.no_grad():
                same = torch.equal(model(torch.arange(2, 12)[None]).logits, scene.expected)
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


OPERATIONS = [
    Operation("mxd push", by_command("push", "{folder}", "{repo}", "--tag", "v1"), pushes=True),
    Operation("mxd push --revision", by_command("push", "{folder}", "{repo}", "--revision", "try"), pushes=True),
    Operation("mxd show", by_command("show", "{repo}")),
    Operation("mxd search", by_command("search")),
    Operation("AutoModel, library installed", by_door(AutoModel, False)),
    Operation("AutoModelForCausalLM, library installed", by_door(AutoModelForCausalLM, False)),
    Operation("AutoModelForCausalLM, without it", by_door(AutoModelForCausalLM, True)),
]


def record(scene, operation):
    """The calls of an operation that nothing disturbs."""
    repo = scene.fresh(operation)
    scene.hub.requests.clear()
    outcome = operation.run(scene, repo)
    assert outcome.kind == COMPLETE, outcome
    calls = []
    for method, path, _ in scene.hub.requests:
        path = path.replace(repo, "{repo}") if operation.pushes else path
        path = re.sub("[0-9a-f]{64}", "{object}", path)
        call = Call(method, re.sub("[0-9a-f]{40}", "{commit}", path))
        if call not in calls and path != "/api/agent-harnesses":
            calls.append(call)
    return calls


def try_fault(scene, operation, call, fault, times):
    """One cell: what came of the operation, or why it is broken."""
    repo = scene.fresh(operation)
    scene.hub.fail(call.method, call.pattern(repo), times=TIMES[times], **FAULTS[fault])
    outcome = operation.run(scene, repo)
    if outcome.kind not in (COMPLETE, REFUSED):
        return outcome
    if outcome.kind == REFUSED and not outcome.message.strip():
        return Outcome("broken: no message")
    if scene.hub.token in outcome.message:
        return Outcome("broken: the token is in the message")
    revision = "try" if "--revision" in operation.name else "main"
    if operation.pushes and not (scene.is_untouched(repo) or scene.is_complete(repo, revision)):
        return Outcome("broken: the repo is half updated")
    if operation.pushes and outcome.kind == COMPLETE and not scene.is_complete(repo, revision):
        return Outcome("broken: said to be complete, and is not")
    if len(scene.hub.repos[repo].commits) > 2:
        return Outcome("broken: more than one commit")
    if odd := scene.odd_files():
        return Outcome(f"broken: {odd[0]} in the cache is not the server's")
    scene.hub.faults.clear()
    again = operation.run(scene, repo)
    if again.kind != COMPLETE or (operation.pushes and not scene.is_complete(repo, revision)):
        return Outcome(f"broken: a repeat gives {again}")
    if odd := scene.odd_files():
        return Outcome(f"broken: {odd[0]} in the cache is not the server's after a repeat")
    return outcome


def offline():
    return mock.patch.object(constants, "HF_HUB_OFFLINE", True)
