"""Processes that end in the middle: a forked copy of this one is killed before a file operation."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

EVENTS = ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "shutil.rmtree")


def _run(work: Callable[[], object]) -> None:
    """Runs in the child, and ends it whatever happens."""
    try:
        work()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def _ended(child: int) -> bool:
    """Whether the child came to its end by itself; an error of its own is one of the test."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def killed_before(count: int, folder: Path, work: Callable[[], object]) -> bool:
    """Does the work, killed before its `count`-th operation on files below `folder`.

    Returns:
        Whether the work ended before that.
    """
    child = os.fork()
    if child:
        return _ended(child)
    seen = 0

    def watch(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event in EVENTS and str(args[0]).startswith(str(folder)):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    _run(work)
    return True


def killed_after(seconds: float, work: Callable[[], object]) -> bool:
    """Does the work, killed after so long; whether it ended before that."""
    child = os.fork()
    if not child:
        _run(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return _ended(child)
