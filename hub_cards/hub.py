"""What push and catalogue share: calls that are repeated where the client doesn't, and errors that say what to do."""

import logging
import time
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
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from mxd.modeling_mxd.downloads import PASSING, first_line, is_transport_error

logger = logging.getLogger(__name__)

ATTEMPTS = 5
TIMEOUT = 30  # seconds

Result = TypeVar("Result")


class HubError(ValueError):
    """The Hub cannot be reached or refuses; the message says what to do."""


def status_of(error: Exception) -> int | None:
    """HTTP status of a client's error, or None."""
    response = getattr(cause_of(error), "response", None)
    return getattr(response, "status_code", None)


def is_broken_connection(error: Exception) -> bool:
    """Whether the connection to the Hub broke, or none was made."""
    return is_transport_error(error) or isinstance(error, ConnectionError)


def cause_of(error: Exception) -> Exception:
    """What the Hub said: the client wraps the failure of an upload into a RuntimeError and of a download into a
    LocalEntryNotFoundError, transformers both into an OSError."""
    wrapped = isinstance(error, RuntimeError | OSError) and getattr(error, "response", None) is None
    cause = error.__cause__
    return cause_of(cause) if wrapped and isinstance(cause, Exception) else error


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: the connection broke, or the server was busy."""
    error = cause_of(error)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return False
    return is_broken_connection(error) or status_of(error) in PASSING


def with_retries(call: Callable[[], Result], what: str) -> Result:
    """Call until it succeeds, at most `ATTEMPTS` times, waiting 1, 2, 4 … seconds in between.

    Raises:
        HubError: it failed for good.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not is_transient(error) or attempt == ATTEMPTS - 1:
                raise explained(error, what) from error
            logger.warning("%s failed (%s), trying again", what, first_line(error))
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def explained(error: Exception, what: str) -> Exception:
    """A `HubError` that says what to do; errors that are not the Hub's as they are."""
    error = cause_of(error)
    if isinstance(error, HubError):
        return error
    advice = [
        (LocalTokenNotFoundError, "no token: log in with `hf auth login`, or set HF_TOKEN"),
        (OfflineModeIsEnabled, "offline mode is on: unset HF_HUB_OFFLINE"),
        (GatedRepoError, "the repo is gated: ask for access on its page"),
        (RevisionNotFoundError, "there is no such branch, tag or commit"),
        (RepositoryNotFoundError, "there is no such repo, or it is private: check the name and `hf auth login`"),
        (LocalEntryNotFoundError, "the Hub cannot be reached and the file is not in the cache"),
        (EntryNotFoundError, "the file is not in the repo"),
        (HFValidationError, first_line(error)),
    ]
    for kind, text in advice:
        if isinstance(error, kind):
            return HubError(f"{what}: {text}")
    if is_broken_connection(error):
        return HubError(f"{what}: the connection to {constants.ENDPOINT} failed ({first_line(error)}); run it again")
    if isinstance(error, HfHubHTTPError):
        texts = {401: "the token is not valid: `hf auth login`", 403: "the token may not write here"}
        return HubError(f"{what}: {texts.get(status_of(error) or 0, first_line(error))}")
    return error


@dataclass(frozen=True)
class HubRepo:
    """What the Hub says of a repo. Cards are strangers': the client's own `ModelInfo` cannot be made of every one, and
    a single such card would end a search.

    Attributes:
        repo_id, commit, private, likes, last_modified: as on the Hub.
        gated: whether its files are given only to those who asked for them.
        files: name → bytes; empty in a list of repos.
        card: the metadata of the README, of any content.
    """

    repo_id: str
    commit: str | None
    private: bool
    likes: int
    last_modified: datetime | None
    files: dict[str, int]
    card: dict[str, Any]
    gated: bool


def look_up(repo_id: str, what: str, revision: str | None = None, token: str | bool | None = None) -> HubRepo:
    """A repo at a revision.

    Raises:
        HubError: it cannot be had.
    """
    path = f"/api/models/{repo_id}" + (f"/revision/{quote(revision, safe='')}" if revision else "")

    def ask() -> HubRepo:
        validate_repo_id(repo_id)
        return _repo(_json(_get(path, token, {"blobs": True})))

    return with_retries(ask, what)


def search(parameters: dict[str, Any], token: str | bool | None = None) -> Iterator[HubRepo]:
    """Repos of models, page by page as they are asked for.

    Raises:
        HubError: the Hub cannot be asked.
    """
    address: str | None = "/api/models"
    while address is not None:
        page: Any = with_retries(partial(_get, address, token, parameters), "searching the Hub")
        yield from map(_repo, _json(page))
        # The address of the next page holds the parameters.
        address, parameters = page.links.get("next", {}).get("url"), {}


def _get(path: str, token: str | bool | None, parameters: dict[str, Any] | None = None) -> Any:
    url = path if "://" in path else constants.ENDPOINT + path
    # None rather than {}, which would take a page's cursor out of its address.
    headers, parameters = build_hf_headers(token=token), parameters or None
    response = get_session().get(url, headers=headers, params=parameters, timeout=TIMEOUT)
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
