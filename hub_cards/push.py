"""Push a decomposition to the Hub in one commit, so that nobody ever loads half of it."""

import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from transformers import AutoTokenizer

from mxd import modeling_mxd
from mxd.base.files import json_text
from mxd.experts.collection_file import EXPERTS_NAME
from mxd.modeling_mxd import DIRECTIONS_NAME, MxDConfig, Steering
from mxd.modeling_mxd.configuration_mxd import AUTO_MAP, DEMO_MODEL, shorten
from mxd.modeling_mxd.loading import ResolvedRepo, recorded_model
from mxd.modeling_mxd.steering import read_directions

from .card import build_card, read_evaluation
from .hub import HubError, HubRepo, get_repo, logger, status_of, with_retries
from .reading import check_weights, read_config, read_json
from .safe_text import is_hub_id, one_line
from .updating import generated_figures, update_card

OLDEST_TRANSFORMERS = "4.56"
"""Oldest transformers that loads a pushed repo; benchmarks/compatibility.py tests it."""

# No checkpoints and no training arguments: both name folders of this machine.
_PATTERNS = (
    "model*.safetensors", "model.safetensors.index.json", DIRECTIONS_NAME, EXPERTS_NAME, "training_log.json",
    "figures/*.png",
    "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.*", "merges.txt",
)  # fmt: skip
# Files of an earlier push that would be loaded, or believed, along with those of a later one.
_STALE = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(directions|experts)\.safetensors|evaluation\.json"
)
_ATTEMPTS = 4  # while others commit to the same branch

Files = dict[str, bytes | Path]  # content by path in the repo


def push_decomposition(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
    license: str | None = None,  # noqa: A002, the Hub's name for it
    tags: Sequence[str] | None = None,
    message: str | None = None,
    also: Mapping[str, bytes | Path] | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Push the folder of a decomposition, with a card and the code that loads it, in one commit.

    A refusal that may pass is tried again, and never makes a second commit. Text that a person wrote into an earlier
    card (of the repo, or else of the folder) is kept. Weights and figures of an earlier push are deleted if this one
    does not have them. If neither the folder nor the repo has a tokenizer, the base model's is added.

    Args:
        folder: as `mxd decompose` or `save_pretrained` wrote it.
        repo_id: `user/name` or `organisation/name`; the repo is created if it does not exist.
        private: whether a new repo is private; None for the default of the account.
        revision: branch, created if it does not exist.
        create_pr: propose the commit as a pull request.
        base_model: Hub id of the base model, if the config names a local folder.
        license: licence of the weights; by default that of the earlier card, or else of the base model.
        tags: tags of the card, in addition to ours.
        message: title of the commit.
        also: further files, by path in the repo. Other files in the same folders are deleted.
        token: token of the Hub; by default the one that is logged in.

    Returns:
        The commit, with `oid`, `commit_url`, `repo_url` and `pr_url`.

    Raises:
        ValueError: the folder holds no complete decomposition, or others cannot load its base model. Nothing was sent.
        HubError: the Hub refuses; the repo is as it was before.
    """
    folder, api = Path(folder), HfApi(token=token)
    config = _checked_config(folder)
    base = _look_up_base(config, base_model, token)
    if base.gated and not private:
        logger.warning("the base model %s is gated: does its licence allow sharing? (else: --private)", base.repo_id)
    files = {**_files_of(folder, base), **(also or {})}
    tokenizer = {} if "tokenizer_config.json" in files else _tokenizer_of(base, token)
    card = build_card(folder, repo_id, license, base.repo_id, base.commit)
    card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *(tags or ())]))

    create = partial(api.create_repo, repo_id, private=private, exist_ok=True)
    repo_id = with_retries(create, f"creating the repo {repo_id}").repo_id
    if revision and revision != "main" and not create_pr and not revision.startswith("refs/"):
        create_branch = partial(api.create_branch, repo_id, branch=revision, exist_ok=True)
        with_retries(create_branch, f"creating the branch {revision}")
    where = (api, repo_id, revision or "main", create_pr)
    folders = {name.split("/")[0] for name in also or {}}
    return _Commit(*where, message or "Upload decomposition", folder, base, card, files, tokenizer, folders).push()


def _checked_config(folder: Path) -> MxDConfig:
    """Return the config of a folder, or raise a ValueError if its weights or directions do not fit."""
    config = read_config(folder / "config.json", folder)
    check_weights(folder, config)
    if (folder / DIRECTIONS_NAME).is_file():
        read_directions(ResolvedRepo(str(folder), {}, ""), config)
    return config


def check_base_id(name: str | None, commit: str | None = None) -> None:
    """Raise a ValueError, saying what to do, if others cannot load a base model by this name and commit."""
    if not name:
        raise ValueError("the config names no base model: set config.base_model_name_or_path to its Hub id")
    if name == DEMO_MODEL:
        raise ValueError("the base model ships with the library mxd and is on no Hub: share one of another model")
    if not is_hub_id(name, commit):
        raise ValueError(f"the base model {shorten(name)} is no Hub id: give the id of the same model (--base-model)")


def _look_up_base(config: MxDConfig, base_model: str | None, token: str | bool | None) -> HubRepo:
    """Return the base model's repo, at the commit that the config names if it is the same repo."""
    name = base_model or config.base_model_name_or_path
    commit = config.base_model_revision if name == config.base_model_name_or_path else None
    check_base_id(name, commit)
    base = with_retries(partial(get_repo, str(name), commit, token), f"looking up the base model {name}")
    if base.card.get("library_name") == "mxd":
        raise ValueError(f"the base model {name} is a decomposition itself: name the language model")
    return base


@dataclass
class _Commit:
    """One commit, made once even if replies of the Hub are lost."""

    api: HfApi
    repo_id: str
    branch: str
    create_pr: bool
    title: str
    folder: Path
    base: HubRepo
    card: ModelCard
    files: Files
    tokenizer: Files  # for a repo without one
    folders: set[str]  # of the repo, that are replaced
    failed: bool = False
    lost: bool = False  # the last attempt got no reply
    mark: str = field(default_factory=lambda: f"mxd push {uuid.uuid4()}")  # tells our own commit from others'

    def push(self) -> CommitInfo:
        for _ in range(_ATTEMPTS):
            try:
                return with_retries(self.attempt, f"pushing to {self.repo_id}")
            except HubError as error:
                if status_of(error.__cause__) != 412:  # 412: somebody else committed in between
                    raise
        raise HubError(f"pushing to {self.repo_id}: others commit to it at the same time; run it again")

    def attempt(self) -> CommitInfo:
        """Make the commit, unless an earlier attempt made it and only its reply was lost."""
        if self.lost and self.create_pr:
            raise HubError(f"pushing to {self.repo_id}: the reply was lost; see whether the pull request exists")
        if self.failed:
            for commit in self.api.list_repo_commits(self.repo_id, revision=self.branch)[:20]:
                if self.mark in commit.message:
                    url = f"{self.api.endpoint}/{self.repo_id}/commit/{commit.commit_id}"
                    return CommitInfo(url, self.title, self.mark, commit.commit_id, self.api.endpoint)
        repo = get_repo(self.repo_id, self.branch, self.api.token)
        readme = self.folder / "README.md"
        if "README.md" in repo.files:
            readme = Path(hf_hub_download(self.repo_id, "README.md", revision=repo.commit, token=self.api.token))
        text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
        how: dict[str, Any] = {"commit_message": self.title, "commit_description": self.mark, "revision": self.branch}
        how |= {"create_pr": self.create_pr, "parent_commit": repo.commit}
        operations = self.operations(repo, text)
        try:
            return self.api.create_commit(self.repo_id, operations, **how)
        except Exception as error:
            self.failed, self.lost = True, status_of(error) is None
            raise

    def operations(self, repo: HubRepo, text: str) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Return new operations (the client changes them) of a commit over a repo, whose card has this text."""
        card = update_card(text, self.card)
        if not card.data.get("license"):
            for name in ("license", "license_name"):
                card.data[name] = one_line(self.base.card.get(name)) or None
        tokenizer = {} if "tokenizer_config.json" in repo.files else self.tokenizer
        files = {**tokenizer, **self.files, "README.md": str(card).encode()}
        stale = {name for name in repo.files if _STALE.fullmatch(name) or name.split("/")[0] in self.folders}
        stale |= generated_figures(text) & repo.files.keys()
        return [
            *(CommitOperationAdd(name, data) for name, data in files.items()),
            *(CommitOperationDelete(name) for name in sorted(stale - files.keys())),
        ]


def _tokenizer_of(base: HubRepo, token: str | bool | None) -> Files:
    """Return the files of the base model's tokenizer; none if it has none that loads without code of its own."""
    if not {"tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"} & base.files.keys():
        return {}
    how: dict[str, Any] = {"revision": base.commit, "token": token}

    def load() -> Any:
        source = recorded_model(base.repo_id, base.commit, {"token": token})
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **how)

    with tempfile.TemporaryDirectory() as folder:
        try:
            with_retries(load, f"reading the tokenizer of {base.repo_id}").save_pretrained(folder)
        except HubError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            logger.warning("pushed without a tokenizer, that of %s cannot be loaded (%s)", base.repo_id, error)
        return {path.name: _with_known_class(path) for path in Path(folder).iterdir()}


def _with_known_class(path: Path) -> bytes:
    """Read a tokenizer's file, with its class under the name that transformers 4 knows too."""
    return re.sub(rb'("tokenizer_class"\s*:\s*)"TokenizersBackend"', rb'\1"PreTrainedTokenizerFast"', path.read_bytes())


def _files_of(folder: Path, base: HubRepo) -> Files:
    """Return the files of a decomposition's folder, and the code that loads it."""
    found = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    files: Files = {path.relative_to(folder).as_posix(): path for path in found}
    for path in folder.glob("*.json"):
        with suppress(ValueError):  # most are no steering
            Steering.from_json(path)
            files[path.name] = path
    if (tokenizer := folder / "tokenizer_config.json").is_file():
        files[tokenizer.name] = _with_known_class(tokenizer)
    # Push the code of this version, not that of the version that wrote the folder, nor what its config names.
    ours = {"base_model_name_or_path": base.repo_id, "base_model_revision": base.commit, "auto_map": AUTO_MAP}
    files["config.json"] = json_text(read_json(folder / "config.json") | ours).encode()
    for path in Path(modeling_mxd.__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            files[path.name] = path
    if (evaluation := read_evaluation(folder)) is not None:
        files["evaluation.json"] = json_text(evaluation).encode()
    return files
