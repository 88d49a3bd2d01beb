"""Sharing a decomposition: everything of it in one commit, so that a reader never sees half of it."""

import json
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from mxd import modeling_mxd
from mxd.modeling_mxd import MxDConfig
from mxd.modeling_mxd.configuration_mxd import AUTO_MAP
from mxd.modeling_mxd.sharing import REPLACED, check_base_id, save_tokenizer, with_known_class

from .card import build_card
from .hub import ATTEMPTS, HubError, HubRepo, explained, is_transient, logger, look_up, status_of, with_retries
from .reading import check_weights, read_config, read_json
from .safe_text import DATA_ENDINGS, dataset_id, last_part
from .updating import LICENSE, generated_figures, license_of, update_card

# Only what belongs to a decomposition is uploaded: no checkpoints, no training arguments (they name local paths).
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.*", "merges.txt")
_PATTERNS = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "training_log.json",
    "figures/*.png",
    *_TOKENIZER,
)


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
    tags: Sequence[str] | None = None,
    message: str | None = None,
    description: str | None = None,
    also: Mapping[str, bytes | Path] | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Push a decomposition's folder with a card and the code that loads it, in one commit.

    What the Hub refuses for the moment is tried again, also after a reply was lost: the commit is not made twice.
    Of an earlier card (the repo's, else the folder's) what was written by hand is kept; weights and figures of an
    earlier push that are no more are deleted. Where neither folder nor repo has a tokenizer, the base model's goes
    along, so that pipelines work.

    Args:
        folder: as `mxd decompose` or `save_pretrained` left it.
        repo_id: user/name or organisation/name; made if need be.
        private: of a new repo; None for the account's default.
        revision: branch, made if need be.
        create_pr: propose the commit as a pull request.
        tag: tag the commit.
        base_model: Hub id of the base model, for a decomposition whose config names a local folder.
        license: of the decomposition's weights; by default that of the base model's card.
        tags: of the card, besides ours.
        message, description: of the commit.
        also: further files of the commit, path in the repo → content. What else is in their folders is deleted.
        token: of the Hub; by default the one that is logged in.

    Returns:
        The commit: its `oid`, `commit_url`, `repo_url`, and `pr_url`.

    Raises:
        ValueError: `folder` holds no complete decomposition, or names a base model that others cannot load; before
            anything is sent.
        HubError: the Hub refuses; the repo is then as it was before.
    """
    folder, api = Path(folder), HfApi(token=token)
    config = read_config(folder / "config.json", folder)
    check_weights(folder, config)
    check_base_id(base_model or config.base_model_name_or_path)
    base, inherited = _base(config, base_model, token)
    if base.gated and not private:
        logger.warning(
            "the base model %s is gated, and what is pushed was made from it: see that its licence allows that, or "
            "push privately (--private, private=True)",
            base.repo_id,
        )
    content = _content(folder, base.repo_id, base.commit) | dict(also or {})
    spare = {} if _has_tokenizer(content) else _tokenizer_of(base, token)

    describe = partial(_card, folder=folder, base=base, inherited=inherited, license=license, tags=tags or ())
    describe(repo_id, {})  # what cannot be described is refused before a repo is made
    repo_id = _make_repo(api, repo_id, private, revision, create_pr, tag)
    folders = {name.split("/")[0] for name in also or ()}
    mine = (folder / "README.md").read_text(encoding="utf-8") if (folder / "README.md").is_file() else None
    commit = _Commit(api, repo_id, revision or "main", create_pr, message, description, mine)
    pushed = commit.push(_Content(content, spare, partial(describe, repo_id), license is None, folders))
    if tag:
        # Not there before: one that is there now is of an attempt whose reply was lost.
        with_retries(
            lambda: api.create_tag(repo_id, tag=tag, revision=pushed.oid, exist_ok=True),
            f"the commit {pushed.oid[:8]} is on the Hub, but tagging it {tag}",
        )
    return pushed


def _card(
    repo_id: str,
    named: Mapping[str, str],
    *,
    folder: Path,
    base: HubRepo,
    inherited: Mapping[str, str],
    license: str | None,  # noqa: A002, as in `push_decomposition`
    tags: Sequence[str],
) -> ModelCard:
    """A new card, with the licence that was asked for, or else that of an earlier card (`named`), or else the base's
    (`inherited`)."""
    # An earlier card may have `other` alone, inherited without its name.
    kept = "license" in named and dict(named) != {"license": inherited.get("license")}
    licence = {"license": license} if license else named if kept else inherited
    built = build_card(folder, repo_id, **licence, base_model=base.repo_id, base_commit=base.commit)
    built.data["tags"] = list(dict.fromkeys([*built.data["tags"], *tags]))
    return built


def _make_repo(
    api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool, tag: str | None
) -> str:
    """Make repo and branch where they are not there, and refuse a tag that is; the repo's id with the user's name."""
    repo = with_retries(lambda: api.create_repo(repo_id, private=private, exist_ok=True), f"making the repo {repo_id}")
    repo_id = repo.repo_id
    if revision and not create_pr and not revision.startswith("refs/"):
        with_retries(
            lambda: api.create_branch(repo_id, branch=revision, exist_ok=True), f"making the branch {revision}"
        )
    if tag:
        _check_free(repo_id, tag, api.token)
    return repo_id


def _check_free(repo_id: str, tag: str, token: str | bool | None) -> None:
    try:
        look_up(repo_id, f"looking for the tag {tag}", tag, token)
    except HubError as error:
        if isinstance(error.__cause__, RevisionNotFoundError):
            return
        raise
    raise HubError(f"{repo_id} has a tag or branch {tag} already: choose another name")


@dataclass
class _Content:
    """What is pushed, before it is known what the repo has.

    Attributes:
        files: path in the repo → what is there.
        spare: tokenizer for a repo that has none.
        card: a new one with what an earlier one says of its licence, or else with the inherited one.
        keep_license: whether that of an earlier card stays.
        folders: of the repo, that are replaced as a whole.
    """

    files: dict[str, bytes | Path]
    spare: dict[str, bytes | Path]
    card: Callable[[Mapping[str, str]], ModelCard]
    keep_license: bool
    folders: set[str]

    def operations(
        self, earlier: HubRepo, earlier_card: str | None
    ) -> list[CommitOperationAdd | CommitOperationDelete]:
        """Made anew for each attempt: the client changes them."""
        card = self.card(license_of(earlier_card) if earlier_card is not None and self.keep_license else {})
        if earlier_card is not None:
            card = update_card(earlier_card, card, keep_license=self.keep_license)
        files = {**({} if _has_tokenizer(earlier.files) else self.spare), **self.files, "README.md": str(card).encode()}
        stale = {name for name in earlier.files if REPLACED.fullmatch(name) or name.split("/")[0] in self.folders}
        stale |= generated_figures(earlier_card or "") & earlier.files.keys()
        return [
            *(CommitOperationAdd(name, data) for name, data in files.items()),
            *(CommitOperationDelete(name) for name in sorted(stale - files.keys())),
        ]


class _Commit:
    """One commit, made once however often the connection breaks."""

    def __init__(
        self,
        api: HfApi,
        repo_id: str,
        branch: str,
        create_pr: bool,
        message: str | None,
        description: str | None,
        own_card: str | None,
    ):
        self.api, self.repo_id, self.branch, self.create_pr = api, repo_id, branch, create_pr
        self.own_card = own_card
        self.message = message or "Upload decomposition"
        self.mark = f"mxd push {uuid.uuid4()}"  # by which we know our own commit when the reply to it was lost
        self.description = f"{description}\n\n{self.mark}" if description else self.mark

    def push(self, content: _Content) -> CommitInfo:
        what = f"pushing to {self.repo_id}"
        for attempt in range(ATTEMPTS):
            parent = look_up(self.repo_id, what, self.branch, self.api.token)
            if attempt and (made := self._made()):
                return made
            operations = content.operations(parent, self._card_of(parent))
            try:
                return self.api.create_commit(
                    self.repo_id,
                    operations,
                    commit_message=self.message,
                    commit_description=self.description,
                    revision=self.branch,
                    create_pr=self.create_pr,
                    parent_commit=parent.commit,  # so that a repeat cannot be a second commit
                )
            except Exception as error:
                if status_of(error) != 412 and not is_transient(error):
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

    def _made(self) -> CommitInfo | None:
        commits = with_retries(
            lambda: self.api.list_repo_commits(self.repo_id, revision=self.branch), f"looking into {self.repo_id}"
        )
        for commit in commits[:20]:
            if self.mark in commit.message:
                url = f"{self.api.endpoint}/{self.repo_id}/commit/{commit.commit_id}"
                return CommitInfo(url, self.message, self.description, commit.commit_id, self.api.endpoint)
        return None

    def _card_of(self, repo: HubRepo) -> str | None:
        if "README.md" not in repo.files:
            return self.own_card

        def load() -> str:
            path = hf_hub_download(
                self.repo_id, "README.md", revision=repo.commit, token=self.api.token, endpoint=self.api.endpoint
            )
            return Path(path).read_text(encoding="utf-8", errors="replace")

        return with_retries(load, f"reading the card of {self.repo_id}")


def _base(config: MxDConfig, base_model: str | None, token: str | bool | None) -> tuple[HubRepo, dict[str, str]]:
    """The base on the Hub at the commit that the config names, and what its card says of its licence."""
    name = base_model or config.base_model_name_or_path
    assert name
    commit = config.base_model_revision if name == config.base_model_name_or_path else None
    try:
        base = look_up(name, f"looking up the base model {name}", commit, token)
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError | RevisionNotFoundError | EntryNotFoundError):
            raise HubError(
                f"{error}; nobody else could load the decomposition: give the Hub id of the same model "
                "(--base-model, base_model=)"
            ) from error
        raise
    if base.card.get("library_name") == "mxd":
        raise ValueError(f"the base model {name} is a decomposition itself: name the language model")
    said = {name: base.card.get(name) for name in LICENSE}
    inherited = {name: value for name, value in said.items() if isinstance(value, str)}
    if inherited.get("license") != "other":
        inherited = {name: value for name, value in inherited.items() if name == "license"}
    elif "://" not in (link := inherited.get("license_link", "")) and link:  # a file of the base's repo
        inherited["license_link"] = f"https://huggingface.co/{base.repo_id}/blob/main/{link}"
    return base, inherited


def _has_tokenizer(names: Mapping[str, Any]) -> bool:
    return "tokenizer_config.json" in names


def _tokenizer_of(base: HubRepo, token: str | bool | None) -> dict[str, bytes | Path]:
    """Files of the base model's tokenizer; none where it has none that loads without code of its own."""
    if not {"tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model"} & base.files.keys():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with_retries(
                lambda: save_tokenizer(base.repo_id, base.commit, folder, token),
                f"reading the tokenizer of {base.repo_id}",
            )
        except HubError:
            raise
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            logger.warning("pushed without a tokenizer, that of %s cannot be loaded (%s)", base.repo_id, error)
            return {}
        return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def _content(folder: Path, base: str, base_commit: str | None) -> dict[str, bytes | Path]:
    """Paths in the repo → what is there."""
    files = sorted({path for pattern in _PATTERNS for path in folder.glob(pattern) if path.is_file()})
    content: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in files}
    if settings := content.get("tokenizer_config.json"):
        content["tokenizer_config.json"] = with_known_class(Path(str(settings)).read_bytes())
    # The code that loads it is today's, not that of the day when the folder was written, nor what its config names.
    ours = {"base_model_name_or_path": base, "base_model_revision": base_commit, "auto_map": AUTO_MAP}
    config = read_json(folder / "config.json") | ours
    content["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    for path in sorted(Path(modeling_mxd.__file__).parent.glob("*.py")):
        if path.name != "__init__.py":
            content[path.name] = path
    if (evaluation := folder / "evaluation.json").is_file():
        values = read_json(evaluation)
        values["settings"] = without_folders(values.get("settings", {}))
        content["evaluation.json"] = (json.dumps(values, indent=2) + "\n").encode()
    return content


# Fields that name data, a model, a decomposition or a checkpoint: what is there is an id of the Hub, or a path.
_NAMING = ["dataset", "heldout_dataset", "model", "decomposition", "base_model_name_or_path", "best_model_checkpoint"]
# Elsewhere: beginnings that only paths have; more than one slash, or one and a data file's ending, which no Hub id has.
_LOCAL = re.compile(
    r"/|~|\.\.?[/\\]|[A-Za-z]:[/\\]|\\\\|file:|[^\s:]*[/\\][^\s:]*[/\\]|[^\s:]+[/\\][^\s:]+("
    + "|".join(map(re.escape, DATA_ENDINGS))
    + ")$",
    re.IGNORECASE,
)


def without_folders(value: Any, field: str = "") -> Any:
    """The same JSON without this machine's folders: of every text that is a local path only the last part is kept."""
    if isinstance(value, dict):
        return {key: without_folders(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item, field) for item in value]
    if not isinstance(value, str):
        return value
    name = value.partition("@")[0] if field == "decomposition" else value  # user/repo@revision
    local = dataset_id(name) is None if field in _NAMING else _LOCAL.match(value)
    return last_part(value) if local else value
