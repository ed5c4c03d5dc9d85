"""Compile a plan in a process of its own, in memory that nothing has touched.

TensorRT-RTX orders some of a plan's tables by where things lie in memory, so its bytes depend on
what the process did before. Every plan is therefore compiled in a child, by a thread whose heap is
new: then they are the same whatever happened on the parent's heap (tests/engines/test_apart.py).
One plan of the VAE's (vae_encoder_first) has still been seen to differ between a whole build and
one that made it alone. A child also stops at once when it is told to, and leaves no memory behind.
CUDA does not survive a fork: where there is a GPU, plans are compiled in place.
"""

import ctypes
import logging
import os
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import torch

from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import Flavour
from wantrt.engines.requests import PlanRequest
from wantrt.errors import BuildError
from wantrt.folder import Progress, silent
from wantrt.interrupt import stoppable
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # of mallopt(3)
LARGE_BYTES = 2**17  # a block of this size gets its own mapping: glibc's default, here for good
MANY_ARENAS = 64
USED_ARENAS = 8  # more than other threads of the parent may have left behind


def build_apart(
    flavour: Flavour, request: PlanRequest, path: Path, progress: Progress = silent
) -> None:
    """Compile a plan into a file. Ctrl-C stops it at once. Raises what `build_plan` raises."""
    if torch.cuda.is_available():
        with stoppable() as stopped:
            path.write_bytes(memoryview(build_plan(flavour, request, progress, stopped)))
        return
    receiver, sender = Pipe(duplex=False)
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child takes no lock of ours
        child = os.fork()
    if child == 0:
        _compile(flavour, request, path, sender, parent)
    try:
        sender.close()
        _listen(receiver, progress)
    except EOFError:
        raise BuildError(
            f"the process that compiled {request.component.name} ended without a word: the system "
            "may have killed it for its memory. Close other programs, or take a smaller --stack."
        ) from None
    finally:
        os.kill(child, signal.SIGKILL)  # it has ended, or is not wanted any more
        os.waitpid(child, 0)
        receiver.close()


def _listen(receiver: Connection, progress: Progress) -> None:
    """Until the child is done; raises EOFError if it ended before."""
    while True:
        kind, content = receiver.recv()
        if kind == "done":
            return
        if kind == "error":
            raise content
        if kind == "progress":
            progress(*content)
        else:
            name, level, message = content
            logging.getLogger(name).log(level, "%s", message)


def _compile(
    flavour: Flavour, request: PlanRequest, path: Path, sender: Connection, parent: int
) -> NoReturn:
    """The child. Says everything through the pipe; the parent's handlers and bars are not its."""

    def work() -> None:
        try:
            plan = build_plan(flavour, request, lambda *report: sender.send(("progress", report)))
            path.write_bytes(memoryview(plan))
            sender.send(("done", None))
        except BaseException as error:
            sender.send(("error", error))

    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == parent:  # else it died before it could be told
            root = logging.getLogger("wantrt")
            root.handlers, root.propagate = [_ToParent(sender)], False
            _run_in_new_heap(work)
    finally:
        os._exit(0)


def _run_in_new_heap(work: Callable[[], None]) -> None:
    """Run in a thread to which glibc gives an arena of its own that nobody has used."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_ARENA_MAX, MANY_ARENAS)
    libc.mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)  # else it moves with what was freed before
    waiting = threading.Event()

    def hold_arena(held: threading.Event) -> None:
        libc.malloc(1)  # the first call of a thread takes an arena: a used one, while there are any
        held.set()
        waiting.wait()

    for _ in range(USED_ARENAS):
        held = threading.Event()
        threading.Thread(target=hold_arena, args=(held,), daemon=True).start()
        held.wait()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()


class _ToParent(logging.Handler):
    def __init__(self, sender: Connection) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        self._sender.send(("log", (record.name, record.levelno, record.getMessage())))
