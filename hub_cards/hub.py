"""Ask the Hub: retry temporary errors, and turn refusals into errors that say what to do."""

import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)  # fmt: skip
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from mxd.modeling_mxd import loading
from mxd.modeling_mxd.loading import first_line, transient_cause

logger = logging.getLogger(__name__)

TIMEOUT = 30  # seconds
# The first match is the advice; an exception class comes before the classes that it derives from.
_ADVICE = (
    (GatedRepoError, "the repo is gated: ask for access on its page"),
    (RevisionNotFoundError, "there is no such branch, tag or commit"),
    (RepositoryNotFoundError, "there is no such repo, or it is private: check the name and `hf auth login`"),
)
_STATUS_ADVICE = {401: "the token is not valid: `hf auth login`", 403: "the token may not write here"}

Result = TypeVar("Result")


class HubError(ValueError):
    """The Hub cannot be reached or refuses; the message says what to do."""


class HubRepo(NamedTuple):
    """A repo as the Hub describes it. The client's `ModelInfo` fails on some cards, and would end a search there."""

    repo_id: str
    commit: str
    gated: bool
    """whether only users who asked for access may read its files"""
    likes: int
    last_modified: datetime | None
    files: dict[str, int]
    """name and bytes of each file; 0 bytes in the results of a search"""
    card: dict[str, Any]
    """untrusted metadata of the README, with values of any type"""


def with_retries(call: Callable[[], Result], what: str) -> Result:
    """Call the Hub until it succeeds, as `mxd.modeling_mxd.loading.with_retries`; `what` is for messages.

    Raises:
        HubError: the Hub cannot be reached or refuses. Other errors are raised as they are.
    """
    try:
        return loading.with_retries(call, what)
    except Exception as error:
        cause = _cause(error)
        if (advice := _advice(cause)) is None:
            raise
        raise HubError(f"{what}: {advice}") from cause


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of the client, or None."""
    return getattr(getattr(_cause(error), "response", None), "status_code", None)


def _cause(error: Any) -> Any:
    """Return the error of the Hub that the client, or transformers, wrapped into a RuntimeError or OSError."""
    wrapped = isinstance(error, RuntimeError | OSError) and getattr(error, "response", None) is None
    return _cause(error.__cause__) if wrapped and error.__cause__ is not None else error


def _advice(error: Exception) -> str | None:
    """Return what to do about an error of the Hub, or None if it is another error."""
    for kind, advice in _ADVICE:
        if isinstance(error, kind):
            return advice
    if isinstance(error, HfHubHTTPError | HFValidationError | LocalTokenNotFoundError):
        return _STATUS_ADVICE.get(status_of(error) or 0, first_line(error))
    if transient_cause(error) or isinstance(error, ConnectionError):
        return f"the connection to {constants.ENDPOINT} failed ({first_line(error)}); run it again"
    return None


def get_repo(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> HubRepo:
    """Ask once for a repo at a revision; the errors are those of the client."""
    validate_repo_id(repo_id)
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    return _repo(_get(f"{constants.ENDPOINT}/api/models/{repo_id}{at}", token, {"blobs": True}).json())


def search(parameters: dict[str, Any], token: str | bool | None = None) -> Iterator[HubRepo]:
    """Yield model repos; each page of results is only asked for when it is needed, with retries."""
    url, asked = f"{constants.ENDPOINT}/api/models", parameters or None
    while url:
        page: Any = with_retries(partial(_get, url, token, asked), "searching the Hub")
        yield from map(_repo, page.json())
        url, asked = page.links.get("next", {}).get("url"), None  # the next page's address holds the parameters


def _get(url: str, token: str | bool | None, parameters: dict[str, Any] | None) -> Any:
    response = get_session().get(url, headers=build_hf_headers(token=token), params=parameters, timeout=TIMEOUT)
    hf_raise_for_status(response)
    return response


def _repo(model: dict[str, Any]) -> HubRepo:
    card, date = model.get("cardData"), model.get("lastModified")
    return HubRepo(
        repo_id=model["id"],
        commit=model.get("sha", ""),
        gated=bool(model.get("gated")),
        likes=model.get("likes") or 0,
        last_modified=datetime.fromisoformat(date.replace("Z", "+00:00")) if date else None,
        files={file["rfilename"]: file.get("size") or 0 for file in model.get("siblings") or []},
        card=card if isinstance(card, dict) else {},
    )
