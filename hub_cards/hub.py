"""Ask the Hub: repeat what fails for the moment, and turn refusals into errors that say what to do."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)  # fmt: skip
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from mxd.modeling_mxd import loading
from mxd.modeling_mxd.loading import first_line, is_transient

logger = logging.getLogger(__name__)

TIMEOUT = 30  # seconds
# The first match is the advice; an exception class comes before the classes that it derives from.
_ADVICE = (
    (LocalTokenNotFoundError, "no token: log in with `hf auth login`, or set HF_TOKEN"),
    (OfflineModeIsEnabled, "offline mode is on: unset HF_HUB_OFFLINE"),
    (GatedRepoError, "the repo is gated: ask for access on its page"),
    (RevisionNotFoundError, "there is no such branch, tag or commit"),
    (RepositoryNotFoundError, "there is no such repo, or it is private: check the name and `hf auth login`"),
    (LocalEntryNotFoundError, "the Hub cannot be reached and the file is not in the cache"),
    (EntryNotFoundError, "the file is not in the repo"),
)

Result = TypeVar("Result")


class HubError(ValueError):
    """The Hub cannot be reached or refuses; the message says what to do."""


def status_of(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error of the client, or None."""
    return getattr(getattr(_cause(error), "response", None), "status_code", None)


def _cause(error: Any) -> Any:
    """Return the error of the Hub that another one wraps.

    The client wraps a failed upload into a RuntimeError and a failed download into a LocalEntryNotFoundError;
    transformers wraps both into an OSError.
    """
    wrapped = isinstance(error, RuntimeError | OSError) and getattr(error, "response", None) is None
    return _cause(error.__cause__) if wrapped and error.__cause__ is not None else error


def with_retries(call: Callable[[], Result], what: str) -> Result:
    """Call until it succeeds, as `mxd.modeling_mxd.loading.with_retries`.

    Args:
        call: asks the Hub.
        what: what the call does, for messages.

    Raises:
        HubError: the Hub cannot be reached or refuses. Other errors are raised as they are.
    """
    try:
        return loading.with_retries(call, what)
    except Exception as error:
        cause = _cause(error)
        advice = None if isinstance(cause, HubError) else _advice(cause)
        if advice is None:
            raise
        raise HubError(f"{what}: {advice}") from cause


def _advice(error: Exception) -> str | None:
    """Return what to do about an error of the Hub, or None if it is another error."""
    for kind, advice in _ADVICE:
        if isinstance(error, kind):
            return advice
    if isinstance(error, HFValidationError):
        return first_line(error)
    if isinstance(error, HfHubHTTPError):
        by_status = {401: "the token is not valid: `hf auth login`", 403: "the token may not write here"}
        return by_status.get(status_of(error) or 0, first_line(error))
    if is_transient(error) or isinstance(error, ConnectionError):
        return f"the connection to {constants.ENDPOINT} failed ({first_line(error)}); run it again"
    return None


@dataclass(frozen=True)
class HubRepo:
    """A repo as the Hub describes it. Anybody may have written its card: the client's own `ModelInfo` cannot be built
    from every card, and a single such card would end a search."""

    repo_id: str
    commit: str | None
    private: bool
    likes: int
    last_modified: datetime | None
    files: dict[str, int]
    """name and bytes of each file; 0 bytes in the results of a search"""
    card: dict[str, Any]
    """metadata of the README, with values of any type"""
    gated: bool
    """whether its files are only given to users who asked for access"""


def get_repo(repo_id: str, revision: str | None = None, token: str | bool | None = None) -> HubRepo:
    """Ask once for a repo at a revision; the errors are those of the client."""
    validate_repo_id(repo_id)
    path = f"/api/models/{repo_id}" + (f"/revision/{quote(revision, safe='')}" if revision else "")
    return _repo(_json(_get(path, token, {"blobs": True})))


def search(parameters: dict[str, Any], token: str | bool | None = None) -> Iterator[HubRepo]:
    """Yield model repos; each page of results is only asked for when it is needed.

    Raises:
        HubError: as `with_retries`.
    """
    address: str | None = "/api/models"
    while address is not None:
        page: Any = with_retries(partial(_get, address, token, parameters), "searching the Hub")
        yield from map(_repo, _json(page))
        # The address of the next page holds the parameters.
        address, parameters = page.links.get("next", {}).get("url"), {}


def _get(path: str, token: str | bool | None, parameters: dict[str, Any]) -> Any:
    url = path if "://" in path else constants.ENDPOINT + path
    # Empty parameters must be None: {} would take the cursor out of the address of a page.
    response = get_session().get(url, headers=build_hf_headers(token=token), params=parameters or None, timeout=TIMEOUT)
    hf_raise_for_status(response)
    return response


def _json(response: Any) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError):
        raise HubError(f"the answer of {constants.ENDPOINT} is no JSON: is it a Hub?") from None


def _repo(model: dict[str, Any]) -> HubRepo:
    card, date = model.get("cardData"), model.get("lastModified")
    return HubRepo(
        repo_id=model["id"],
        commit=model.get("sha"),
        private=bool(model.get("private")),
        likes=model.get("likes") or 0,
        last_modified=datetime.fromisoformat(date.replace("Z", "+00:00")) if date else None,
        files={file["rfilename"]: file.get("size") or 0 for file in model.get("siblings") or []},
        card=card if isinstance(card, dict) else {},
        gated=bool(model.get("gated")),
    )
