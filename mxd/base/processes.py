"""Several processes of one run, as torchrun, accelerate launch and mpirun start them. torch is imported only then."""

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

Result = TypeVar("Result")

# The variables from which accelerate, and so every Trainer, learns of other processes.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_YEAR = timedelta(days=365)
_ENDED = "another process has ended, see its message: run again with --resume"
_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")


class FirstProcessError(RuntimeError):
    """The first process raised an error that is no `ValueError`; the message is that of the error."""


class OtherProcessError(RuntimeError):
    """Another process ended before this one was done."""


def launched() -> tuple[int, int]:
    """Return the rank of this process and the number of processes, as the launcher's variables say."""
    ranks, counts = (
        [int(os.environ[name]) for name in names if os.environ.get(name, "").isdecimal()] for names in (_RANKS, _COUNTS)
    )
    return (ranks[0], counts[0]) if ranks and counts and counts[0] > 1 else (0, 1)


def leave() -> None:
    """Forget the launcher's variables, so that no library waits for the other processes."""
    for name in (*_COUNTS, *_RANKS, "LOCAL_RANK"):
        os.environ.pop(name, None)


def check_one_process() -> None:
    """Raise a `ValueError` if this is one of several processes, which would all write into the same output folder."""
    counts = {name: int(os.environ[name]) for name in _COUNTS if os.environ.get(name, "").isdecimal()}
    counts["torch.distributed"] = joined()
    for name, count in counts.items():
        if count > 1:
            raise ValueError(
                f"{count} processes ({name}) would write into the same folder: call this in one process, without "
                "torchrun, accelerate launch or mpirun, and unset the variable if it was left by one of them"
            )


_apart: list[tuple[int, int]] = []  # rank and number of processes, once this one trains apart


def train_apart() -> tuple[int, int]:
    """Make every Trainer of this process train as if there were no other; return `launched()` as it was before.

    A process sees one GPU only, that of its `LOCAL_RANK`, so this has to come before anything looks for GPUs.
    """
    if not _apart:
        rank, count = launched()
        if count == 1:
            return rank, count
        local = int(os.environ.get("LOCAL_RANK", rank))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local % len(visible)] if visible[0] else str(local)
        _apart.append((rank, count))
        leave()
    return _apart[0]


def are_apart() -> bool:
    """Return whether `train_apart` took effect: each process trains on all rows of a step."""
    return bool(_apart)


def join_apart() -> None:
    """Make a process group of the processes that `train_apart` told apart, which waits for a year."""
    from torch import distributed

    if not _apart or distributed.is_initialized():
        return
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):  # mpirun sets none
        os.environ.setdefault(name, value)
    distributed.init_process_group(rank=_apart[0][0], world_size=_apart[0][1], timeout=_YEAR)


def wait_for_all() -> None:
    """Wait without a time-out until all processes are here.

    Raises:
        OtherProcessError: Another one has ended.
    """
    if joined() == 1:
        return
    from torch import distributed

    try:
        distributed.barrier(_waiting_group(distributed.group.WORLD))
    except RuntimeError as error:
        raise OtherProcessError(_ENDED) from error


def joined() -> int:
    """Return the number of processes in the process group of torch; 1 if there is none."""
    from torch import distributed

    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def in_first_process(function: Callable[[], Result]) -> Result:
    """Call a function in the first process only, and return its result, or raise its error, in all processes.

    The others wait without a time-out. The process group, if there are several processes, must have been made.

    Raises:
        OtherProcessError: Another process has ended.
    """
    if joined() == 1:
        return function()
    from torch import distributed

    outcome: list[Any] = [None, None, None]
    failure: Exception | None = None
    group = _waiting_group(distributed.group.WORLD)
    if distributed.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:  # of any kind, and not every kind can be pickled
            failure, outcome[1:] = error, [str(error) or type(error).__name__, isinstance(error, ValueError)]
    try:
        distributed.broadcast_object_list(outcome, 0, group)
    except RuntimeError as error:
        raise failure or OtherProcessError(_ENDED) from error
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise (ValueError if outcome[2] else FirstProcessError)(outcome[1])
    return outcome[0]


@cache
def _waiting_group(world: Any) -> Any:
    """Return a group of all processes of `world` that waits for a year, whatever the time-out of the world is."""
    from torch import distributed

    return distributed.new_group(backend="gloo", timeout=_YEAR)
