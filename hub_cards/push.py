"""Sharing a decomposition: everything of it in one commit, so that a reader never sees half of it."""

import json
import re
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open

import modeling_mxd
from modeling_mxd import MxDConfig

from .card import build_card, update_card
from .hub import ATTEMPTS, HubError, explained, logger, passes, read_json, retried, status_of

# Only what belongs to a decomposition is uploaded: no checkpoints, no training arguments (they name local paths).
_PATTERNS = (
    "*.safetensors",
    "model.safetensors.index.json",
    "training_log.json",
    "figures/*.png",
    "tokenizer*",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.*",
    "merges.txt",
)
# What an earlier push left and this one has not would be loaded along with it.
_REPLACED = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|figures/[^/]+\.png|evaluation\.json|[^/]+\.py"
)


@dataclass(frozen=True)
class PushedDecomposition:
    """Where a decomposition went.

    Attributes:
        repo_id: on the Hub.
        url: of the repo, or of the pull request.
        commit: its hash.
    """

    repo_id: str
    url: str
    commit: str


def push_decomposition(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002, the card's own name for it
    message: str = "Upload decomposition",
    token: str | bool | None = None,
) -> PushedDecomposition:
    """Push a decomposition's folder with a card and the code that loads it, in one commit.

    What the Hub refuses for the moment is tried again, also after a reply was lost: the commit is not made twice.
    Of an earlier card, what was written by hand is kept; weights and figures that are no more are deleted.

    Args:
        folder: as `mxd decompose` or `save_pretrained` left it.
        repo_id: user/name or organisation/name; made if need be.
        private: of a new repo; None for the account's default.
        revision: branch, made if need be.
        create_pr: propose the commit as a pull request.
        tag: tag the commit.
        base_model: Hub id of the base model, for a decomposition whose config names a local folder.
        license: of the decomposition's weights; by default that of the base model's card.
        message: of the commit.
        token: of the Hub; by default the one that is logged in.

    Raises:
        ValueError: `folder` holds no complete decomposition, or names a base model that others cannot load; before
            anything is sent.
        HubError: the Hub refuses; the repo is then as it was before.
    """
    folder, api = Path(folder), HfApi(token=token)
    config = _check_folder(folder, base_model)
    base, base_commit, inherited = _base(api, config, base_model)
    content = _content(folder, base, base_commit)
    repo = retried(lambda: api.create_repo(repo_id, private=private, exist_ok=True), f"making the repo {repo_id}")
    repo_id = repo.repo_id
    branch = revision or "main"
    if revision and not create_pr:
        retried(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True), f"making the branch {branch}")
    card = build_card(folder, repo_id=repo_id, license=license or inherited, base_model=base)
    commit = _Commit(api, repo_id, branch, create_pr, message, keep_license=license is None)
    pushed = commit.push(content, card)
    if tag:
        retried(
            lambda: api.create_tag(repo_id, tag=tag, revision=pushed.commit, exist_ok=True),
            f"the commit {pushed.commit[:8]} is on the Hub, but tagging it {tag}",
        )
    return pushed


class _Commit:
    """One commit, made once however often the connection breaks."""

    def __init__(self, api: HfApi, repo_id: str, branch: str, create_pr: bool, message: str, keep_license: bool):
        self.api, self.repo_id, self.branch, self.create_pr, self.message = api, repo_id, branch, create_pr, message
        self.keep_license = keep_license
        self.mark = f"mxd push {uuid.uuid4()}"  # by which we know our own commit when the reply to it was lost

    def push(self, content: dict[str, bytes | Path], card: Any) -> PushedDecomposition:
        what = f"pushing to {self.repo_id}"
        for attempt in range(ATTEMPTS):
            info = retried(lambda: self.api.model_info(self.repo_id, revision=self.branch), what)
            assert info.sha
            if attempt and (made := self._made()):
                return made
            earlier = {file.rfilename for file in info.siblings or []}
            operations = self._operations(content, card, earlier, info.sha)
            try:
                done = self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=self.message,
                    commit_description=self.mark,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=info.sha,  # so that a repeat cannot be a second commit
                )
                return PushedDecomposition(self.repo_id, done.pr_url or str(done.repo_url), done.oid)
            except Exception as error:
                if status_of(error) != 412 and not passes(error):
                    raise explained(error, what) from error
                if self.create_pr and status_of(error) is None:
                    raise HubError(f"{what}: the reply was lost; see whether the pull request is there") from error
                if attempt == ATTEMPTS - 1:
                    if made := self._made():
                        return made
                    if status_of(error) == 412:
                        raise HubError(f"{what}: others commit to it at the same time; run it again") from error
                    raise explained(error, what) from error
                logger.warning("%s failed, trying again", what)
                time.sleep(2**attempt)
        raise AssertionError("unreachable")

    def _made(self) -> PushedDecomposition | None:
        commits = retried(
            lambda: self.api.list_repo_commits(self.repo_id, revision=self.branch), f"looking into {self.repo_id}"
        )
        for commit in commits[:20]:
            if self.mark in commit.message:
                url = f"{self.api.endpoint}/{self.repo_id}"
                return PushedDecomposition(self.repo_id, url, commit.commit_id)
        return None

    def _operations(
        self, content: dict[str, bytes | Path], card: Any, earlier: set[str], parent: str
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        # Made anew for each attempt: the client changes them.
        if "README.md" in earlier:
            earlier_card = self._earlier_card(parent)
            card = update_card(earlier_card, card)
            if self.keep_license:  # one that a person chose goes over the inherited one
                chosen = ModelCard(earlier_card).data.to_dict().get("license")
                card.data["license"] = chosen or card.data.get("license")
        content = {**content, "README.md": str(card).encode()}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, data) for name, data in content.items()
        ]
        stale = sorted(name for name in earlier if _REPLACED.fullmatch(name) and name not in content)
        return operations + [CommitOperationDelete(name) for name in stale]

    def _earlier_card(self, commit: str) -> str:
        def load() -> str:
            path = hf_hub_download(
                self.repo_id, "README.md", revision=commit, token=self.api.token, endpoint=self.api.endpoint
            )
            return Path(path).read_text(encoding="utf-8")

        return retried(load, f"reading the card of {self.repo_id}")


def _check_folder(folder: Path, base_model: str | None) -> MxDConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no decomposition: there is no config.json in it")
    values = read_json(folder / "config.json")
    if values.get("model_type") != MxDConfig.model_type:
        raise ValueError(f"{folder} holds a model, but no decomposition")
    config = MxDConfig.from_dict(values)
    weights = sorted(folder.glob("model*.safetensors"))
    try:
        keys = set()
        for path in weights:
            with safe_open(path, framework="pt") as file:
                keys |= set(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path.name} in {folder} is no complete safetensors file: {error}") from None
    for layer in config.layers:
        if not any(key.startswith(f"layers.{layer}.") for key in keys):
            raise ValueError(f"{folder} has no weights of layer {layer}: is its training complete?")
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ValueError(f"{folder}/config.json names no base model: say which with base_model=")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or Path(name).is_dir():
        raise ValueError(
            f"the base model {name!r} is no Hub id, so nobody else can load the decomposition: give the Hub id of the "
            "same model (--base-model, base_model=)"
        )
    return config


def _base(api: HfApi, config: MxDConfig, base_model: str | None) -> tuple[str, str | None, str | None]:
    """Hub id, commit and licence of the base."""
    name = base_model or config.base_model_name_or_path
    assert name
    commit = config.base_model_revision if name == config.base_model_name_or_path else None
    try:
        info = retried(lambda: api.model_info(name, revision=commit), f"looking up the base model {name}")
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
            raise HubError(f"{error}; a reader could not load the decomposition") from error
        raise
    inherited = getattr(info.card_data, "license", None) if info.card_data else None
    return name, commit or info.sha, inherited if isinstance(inherited, str) else None


def _content(folder: Path, base: str, base_commit: str | None) -> dict[str, bytes | Path]:
    """Paths in the repo → what is there."""
    files = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    content: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in files}
    config = read_json(folder / "config.json") | {"base_model_name_or_path": base, "base_model_revision": base_commit}
    content["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    # The code that loads it is today's, not that of the day when the folder was written.
    for path in sorted(Path(modeling_mxd.__file__).parent.glob("*.py")):
        if path.name != "__init__.py":
            content[path.name] = path
    if (evaluation := folder / "evaluation.json").is_file():
        content["evaluation.json"] = (json.dumps(public_evaluation(read_json(evaluation)), indent=2) + "\n").encode()
    return content


_LOCAL = re.compile(r"/|~|\.\.?/|[A-Za-z]:\\")


def public_evaluation(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The same without this machine's folders: of every local path in the settings only the last part is kept."""

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list):
            return [shorten(item) for item in value]
        local = isinstance(value, str) and (
            value.startswith(("/", "~", "./", "../")) or re.match(r"[A-Za-z]:\\", value)
        )
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if local else value

    return {**evaluation, "settings": shorten(evaluation.get("settings", {}))}
