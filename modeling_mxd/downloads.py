"""Downloads of both doors: tried again where transformers gives up at the first fault, and refused with the reason
where it names none or takes a fault for a file that is not there."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from transformers.utils import cached_file, logging

logger = logging.get_logger(__name__)

ATTEMPTS = 4
PASSING = (429, 500, 502, 503, 504)

Result = TypeVar("Result")


def with_retries(call: Callable[[], Result], name: Any) -> Result:
    """`call()`, up to `ATTEMPTS` times if the connection to the Hub breaks or it is busy. Files that are complete are
    in the cache by then.

    Raises:
        OSError: naming `name` and the reason, when it failed each time. Other errors pass.
    """
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as error:
            reason = _broken(error)
            if reason is None:
                raise
            if attempt == ATTEMPTS - 1:
                raise OSError(
                    f"{name} cannot be had from the Hub ({reason}); what was downloaded is kept: try again"
                ) from error
            logger.warning(f"{name}: {reason}; trying again")
            time.sleep(2**attempt)
    raise AssertionError("unreachable")


def file_if_any(name: Any, file: str, access: dict[str, Any]) -> str | None:
    """Path of a file of a folder or repo; None where it has no such file.

    Raises:
        OSError: as `tried`.
    """

    def find() -> str | None:
        try:
            return cached_file(name, file, **access)
        except OSError as error:
            if _broken(error) is not None:
                raise
            return None

    return with_retries(find, name)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, of its type where it says nothing."""
    return (str(error).strip().split("\n", 1)[0] or type(error).__name__)[:300]


def is_transport_error(error: BaseException) -> bool:
    """Whether the connection broke. By name: the client's HTTP library is httpx up to huggingface_hub 1, and httpx2
    from 2."""
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)


def is_transient(error: BaseException) -> bool:
    """Return whether another try may succeed."""
    return _broken(error) is not None


def _broken(error: BaseException | None) -> str | None:
    """What broke a download, if something passing did: transformers hides it behind errors of its own."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in PASSING or is_transport_error(error):
            return first_line(error)
        error = error.__cause__ or error.__context__
    return None
