"""The process that compiles plans for another: `python -m wantrt.engines.compiler FLAVOUR FD`.

It imports TensorRT, then makes a child for every request that comes through the socket FD, so that
each plan is compiled in the same memory, whatever was compiled before (engines/apart.py). What the
child has to say goes straight into the socket; when it has ended this process says so. It ends when
the other end of the socket is closed, as it is however the parent ends, and takes its child along.
"""

import ctypes
import gc
import logging
import os
import pickle
import select
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import Flavour, find_flavour
from wantrt.engines.requests import PlanRequest
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def serve(flavour: Flavour, socket: Connection) -> None:
    """Until nobody is at the other end. Requests are read by the children.

    So this process stays as it is: what it read would leave its trace in the memory that the next
    child gets.
    """
    server = os.getpid()
    while not _has_closed(socket, until=(socket, select.POLLIN)):
        child = os.fork()
        if child == 0:
            _compile(flavour, socket, server)
        ended = os.pidfd_open(child)
        if _has_closed(socket, until=(ended, select.POLLIN)):
            os.kill(child, signal.SIGKILL)
            return
        os.close(ended)
        os.waitpid(child, 0)
        socket.send(("ended", None))


def _has_closed(socket: Connection, until: tuple[Connection | int, int]) -> bool:
    """Wait for an event, or for the other end of the socket to close: True."""
    poll = select.poll()
    poll.register(socket, 0)  # tells of the end in any case
    poll.register(*until)
    return any(events & select.POLLHUP for _, events in poll.poll())


def _compile(flavour: Flavour, socket: Connection, server: int) -> NoReturn:
    """The child. A new thread has a heap of its own, and only TensorRT's blocks shall lie in it.

    What Python collects there, at a moment that depends on what was before, would be handed out
    again: so nothing is collected, and glibc keeps no free blocks by thread (engines/apart.py).
    """

    def work(request: PlanRequest, path: Path) -> None:
        try:
            plan = build_plan(flavour, request, lambda *report: socket.send(("progress", report)))
            path.write_bytes(memoryview(plan))
            socket.send(("done", None))
        except BaseException as error:
            socket.send(("error", error))

    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)
        if os.getppid() == server:  # else it died before it could be told
            logging.getLogger("wantrt").addHandler(_ToParent(socket))
            gc.disable()
            request, path = pickle.loads(socket.recv_bytes())
            request = replace(request, baked=dict(request.baked))  # files are mapped here
            worker = threading.Thread(target=work, args=(request, path))
            worker.start()
            worker.join()
    except BaseException as error:
        socket.send(("error", error))
    finally:
        os._exit(0)


class _ToParent(logging.Handler):
    def __init__(self, socket: Connection) -> None:
        super().__init__()
        self._socket = socket

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # nobody listens any more, and the end is near
            self._socket.send(("log", (record.name, record.levelno, record.getMessage())))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
    logging.getLogger("wantrt").setLevel(logging.DEBUG)  # and it decides what is shown
    name, descriptor = sys.argv[1:]
    serve(find_flavour(name), Connection(int(descriptor)))


if __name__ == "__main__":
    main()
