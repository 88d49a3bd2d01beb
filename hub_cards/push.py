"""Push a decomposition to the Hub in one commit, so that nobody ever loads half of it."""

import json
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from transformers import AutoTokenizer

from mxd import modeling_mxd
from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.configuration_mxd import AUTO_MAP, DEMO_MODEL, shorten

from .card import build_card
from .hub import HubError, HubRepo, get_repo, logger, status_of, with_retries
from .reading import check_weights, read_config, read_json
from .safe_text import is_hub_id, one_line, without_folders
from .updating import LICENSE, generated_figures, license_of, update_card

OLDEST_TRANSFORMERS = "4.56"
"""Oldest transformers that loads a pushed repo; benchmarks/compatibility.py tests it."""

# No checkpoints and no training arguments: both name folders of this machine.
_PATTERNS = (
    "model*.safetensors", "model.safetensors.index.json", "training_log.json", "figures/*.png",
    "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.*", "merges.txt",
)  # fmt: skip
# Files of an earlier push that would be loaded, or believed, along with those of a later one.
_STALE = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|evaluation\.json")
_ATTEMPTS = 4  # while others commit to the same branch


def push_decomposition(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
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
        tag: new tag of the commit.
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
    config = read_config(folder / "config.json", folder)
    check_weights(folder, config)
    check_base_id(base_model or config.base_model_name_or_path)
    base = _look_up_base(config, base_model, token)
    if base.gated and not private:
        advice = "check that its licence allows sharing what was made from it, or push privately (--private)"
        logger.warning("the base model %s is gated: %s", base.repo_id, advice)
    title = message or "Upload decomposition"
    push = _Push(api, repo_id, revision or "main", create_pr, title, folder, base, license, tags or (), also or {})
    return push.run(private, tag)


def check_base_id(name: str | None) -> None:
    """Refuse the name of a base model that others cannot load.

    Raises:
        ValueError: saying what to do.
    """
    if not name:
        raise ValueError("the config names no base model: set config.base_model_name_or_path to its Hub id")
    if name == DEMO_MODEL:
        raise ValueError("the base model ships with the library mxd and is on no Hub: share one of another model")
    if not is_hub_id(name):
        raise ValueError(
            f"the base model {shorten(name)} is no Hub id, so nobody else can load the decomposition: set "
            "config.base_model_name_or_path to the Hub id of the same model"
        )


def _look_up_base(config: MxDConfig, base_model: str | None, token: str | bool | None) -> HubRepo:
    """Return the base model's repo, at the commit that the config names if it is the same repo."""
    name = base_model or config.base_model_name_or_path
    assert name
    commit = config.base_model_revision if name == config.base_model_name_or_path else None
    try:
        base = with_retries(partial(get_repo, name, commit, token), f"looking up the base model {name}")
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
            raise HubError(f"{error}; name the same model by its Hub id (--base-model, base_model=)") from error
        raise
    if base.card.get("library_name") == "mxd":
        raise ValueError(f"the base model {name} is a decomposition itself: name the language model")
    return base


def _license_of_base(base: HubRepo) -> dict[str, str]:
    """Return what the base model's card says of its licence; a name and a link only belong to the licence `other`."""
    said = {name: one_line(value) for name in LICENSE if isinstance(value := base.card.get(name), str)}
    if said.get("license") != "other":
        return {name: value for name, value in said.items() if name == "license"}
    link = said.get("license_link")
    if link and "://" not in link:  # a file of the base's repo
        said["license_link"] = f"https://huggingface.co/{base.repo_id}/blob/main/{link}"
    return said


@dataclass
class _Push:
    """One commit, made once even if replies of the Hub are lost."""

    api: HfApi
    repo_id: str
    branch: str
    create_pr: bool
    message: str
    folder: Path
    base: HubRepo
    license: str | None
    tags: Sequence[str]
    also: Mapping[str, bytes | Path]
    files: dict[str, bytes | Path] = field(default_factory=dict)
    """content by path in the repo"""
    tokenizer: dict[str, bytes | Path] = field(default_factory=dict)
    """files for a repo without a tokenizer"""
    failed: bool = False
    lost: bool = False
    """the last attempt got no reply"""
    mark: str = field(default_factory=lambda: f"mxd push {uuid.uuid4()}")
    """text that tells our own commit from others'"""

    def run(self, private: bool | None, tag: str | None) -> CommitInfo:
        """Create repo and branch if they do not exist, make the commit, and tag it."""
        self.files = {**_files_of(self.folder, self.base), **self.also}
        if "tokenizer_config.json" not in self.files:
            self.tokenizer = _tokenizer_of(self.base, self.api.token)
        self.card({})  # refuse what cannot be described before a repo is created
        create = partial(self.api.create_repo, self.repo_id, private=private, exist_ok=True)
        self.repo_id = with_retries(create, f"creating the repo {self.repo_id}").repo_id
        if self.branch != "main" and not self.create_pr and not self.branch.startswith("refs/"):
            create = partial(self.api.create_branch, self.repo_id, branch=self.branch, exist_ok=True)
            with_retries(create, f"creating the branch {self.branch}")
        if tag:
            self.check_free(tag)
        commit = self.commit()
        if tag:  # it was free: a tag that exists now was set by an attempt whose reply was lost
            create = partial(self.api.create_tag, self.repo_id, tag=tag, revision=commit.oid, exist_ok=True)
            with_retries(create, f"the commit {commit.oid[:8]} is on the Hub, but tagging it {tag}")
        return commit

    def check_free(self, tag: str) -> None:
        try:
            with_retries(partial(get_repo, self.repo_id, tag, self.api.token), f"looking for the tag {tag}")
        except HubError as error:
            if isinstance(error.__cause__, RevisionNotFoundError):
                return
            raise
        raise HubError(f"{self.repo_id} has a tag or branch {tag} already: choose another name")

    def commit(self) -> CommitInfo:
        for _ in range(_ATTEMPTS):
            try:
                return with_retries(self.attempt, f"pushing to {self.repo_id}")
            except HubError as error:
                if status_of(error.__cause__) != 412:  # 412: somebody else committed in between
                    raise
        raise HubError(f"pushing to {self.repo_id}: others commit to it at the same time; run it again")

    def card(self, earlier_license: Mapping[str, str]) -> ModelCard:
        """Build a card with the licence that was asked for, or else the earlier card's, or else the base model's."""
        inherited = _license_of_base(self.base)
        # An earlier card may have inherited `other` without its name: take it anew.
        kept = "license" in earlier_license and earlier_license != {"license": inherited.get("license")}
        card = build_card(self.folder, self.repo_id, self.license, self.base.repo_id, self.base.commit)
        for name, value in ({} if self.license else earlier_license if kept else inherited).items():
            card.data[name] = value
        card.data["tags"] = list(dict.fromkeys([*card.data["tags"], *self.tags]))
        return card

    def operations(self, repo: HubRepo, text: str | None) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Return new operations (the client changes them) of a commit over a repo, whose card has this text."""
        if text is None and (own := self.folder / "README.md").is_file():
            text = own.read_text(encoding="utf-8")
        keep_license = self.license is None
        card = self.card(license_of(text) if text is not None and keep_license else {})
        if text is not None:
            card = update_card(text, card, keep_license=keep_license)
        tokenizer = {} if "tokenizer_config.json" in repo.files else self.tokenizer
        files = {**tokenizer, **self.files, "README.md": str(card).encode()}
        folders = {name.split("/")[0] for name in self.also}
        stale = {name for name in repo.files if _STALE.fullmatch(name) or name.split("/")[0] in folders}
        stale |= generated_figures(text or "") & repo.files.keys()
        return [
            *(CommitOperationAdd(name, data) for name, data in files.items()),
            *(CommitOperationDelete(name) for name in sorted(stale - files.keys())),
        ]

    def attempt(self) -> CommitInfo:
        """Make the commit, unless an earlier attempt made it and only its reply was lost."""
        if self.lost and self.create_pr:
            raise HubError(f"pushing to {self.repo_id}: the reply was lost; see whether the pull request exists")
        if self.failed:
            for commit in self.api.list_repo_commits(self.repo_id, revision=self.branch)[:20]:
                if self.mark in commit.message:
                    url = f"{self.api.endpoint}/{self.repo_id}/commit/{commit.commit_id}"
                    return CommitInfo(url, self.message, self.mark, commit.commit_id, self.api.endpoint)
        repo = get_repo(self.repo_id, self.branch, self.api.token)
        text = None
        if "README.md" in repo.files:
            path = hf_hub_download(self.repo_id, "README.md", revision=repo.commit, token=self.api.token)
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        operations = self.operations(repo, text)
        how = {"commit_message": self.message, "commit_description": self.mark, "revision": self.branch}
        try:
            return self.api.create_commit(
                self.repo_id, operations, **how, create_pr=self.create_pr, parent_commit=repo.commit
            )
        except Exception as error:
            self.failed, self.lost = True, status_of(error) is None
            raise


def _tokenizer_of(base: HubRepo, token: str | bool | None) -> dict[str, bytes | Path]:
    """Return the files of the base model's tokenizer; none if it has none that loads without code of its own."""
    if not {"tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"} & base.files.keys():
        return {}
    load = partial(
        AutoTokenizer.from_pretrained, base.repo_id, revision=base.commit, token=token, trust_remote_code=False
    )
    with tempfile.TemporaryDirectory() as folder:
        try:
            with_retries(load, f"reading the tokenizer of {base.repo_id}").save_pretrained(folder)
        except HubError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            logger.warning("pushed without a tokenizer, that of %s cannot be loaded (%s)", base.repo_id, error)
            return {}
        files: dict[str, bytes | Path] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return _with_known_class(files)


def _with_known_class(files: dict[str, bytes | Path]) -> dict[str, bytes | Path]:
    """Return files with the tokenizer's class under the name that transformers 4 knows too."""
    settings = files.get("tokenizer_config.json")
    if settings is None:
        return files
    data = settings if isinstance(settings, bytes) else settings.read_bytes()
    data = re.sub(rb'("tokenizer_class"\s*:\s*)"TokenizersBackend"', rb'\1"PreTrainedTokenizerFast"', data)
    return files | {"tokenizer_config.json": data}


def _files_of(folder: Path, base: HubRepo) -> dict[str, bytes | Path]:
    """Return the files of a decomposition's folder, and the code that loads it, by path in the repo."""
    found = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    files: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in found}
    # Push the code of this version, not that of the version that wrote the folder, nor what its config names.
    ours = {"base_model_name_or_path": base.repo_id, "base_model_revision": base.commit, "auto_map": AUTO_MAP}
    files["config.json"] = _json_bytes(read_json(folder / "config.json") | ours)
    for path in sorted(Path(modeling_mxd.__file__).parent.glob("*.py")):
        if path.name != "__init__.py":
            files[path.name] = path
    if (evaluation := folder / "evaluation.json").is_file():
        values = read_json(evaluation)
        files["evaluation.json"] = _json_bytes(values | {"settings": without_folders(values.get("settings", {}))})
    return _with_known_class(files)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
