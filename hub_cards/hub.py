"""What push and catalogue share: calls that are repeated where the client doesn't, and errors that say what to do."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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

logger = logging.getLogger(__name__)

MAX_JSON_BYTES = 10_000_000
_PASSING = (429, 500, 502, 503, 504)
ATTEMPTS = 5

Result = TypeVar("Result")


class HubError(ValueError):
    """The Hub cannot be reached or refuses; the message says what to do."""


def status_of(error: Exception) -> int | None:
    """HTTP status of a client's error, or None."""
    response = getattr(cause_of(error), "response", None)
    return getattr(response, "status_code", None)


def is_broken_connection(error: Exception) -> bool:
    """By name: the client's HTTP library is httpx up to huggingface_hub 1, and httpx2 from 2."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return "TransportError" in names or isinstance(error, ConnectionError)


def cause_of(error: Exception) -> Exception:
    """What the Hub said: the client wraps the failure of an upload into a RuntimeError."""
    wrapped = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
    return cause_of(error.__cause__) if wrapped else error  # type: ignore[arg-type]


def passes(error: Exception) -> bool:
    """Whether trying again may help: the connection broke, or the server was busy."""
    error = cause_of(error)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return False
    return is_broken_connection(error) or status_of(error) in _PASSING


def retried(call: Callable[[], Result], what: str) -> Result:
    """Call until it succeeds, at most `ATTEMPTS` times, waiting 1, 2, 4 … seconds in between.

    Raises:
        HubError: it failed for good.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            if not passes(error) or attempt == ATTEMPTS - 1:
                raise explained(error, what) from error
            logger.warning("%s failed (%s), trying again", what, _first_line(error))
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
        (HFValidationError, _first_line(error)),
    ]
    for kind, text in advice:
        if isinstance(error, kind):
            return HubError(f"{what}: {text}")
    if is_broken_connection(error):
        return HubError(f"{what}: the connection to {constants.ENDPOINT} failed ({_first_line(error)}); run it again")
    if isinstance(error, HfHubHTTPError):
        texts = {401: "the token is not valid: `hf auth login`", 403: "the token may not write here"}
        return HubError(f"{what}: {texts.get(status_of(error) or 0, _first_line(error))}")
    return error


def _first_line(error: Exception) -> str:
    return (str(error).strip().split("\n", 1)[0] or type(error).__name__)[:300]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that a stranger may have written.

    Raises:
        ValueError: naming the file: over 10 MB, too deep, or no JSON object.
    """
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is larger than {MAX_JSON_BYTES:,} bytes: it is not read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON that can be read: {_first_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} must hold a JSON object, got {type(value).__name__}")
    return value
