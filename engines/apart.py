"""Compile a plan in a process of its own, in memory that nothing has touched.

TensorRT-RTX orders some of a plan's tables by where in a heap its objects lie, so one block more,
allocated before or meanwhile, changes the plan's bytes. So plans are compiled by a process that is
started for that alone and has no past (engines/compiler.py), from a message that is the same
whatever this process did. Then they are the same too (tests/engines/test_apart.py). It also stops
at once when it is told to, and leaves no memory behind.
Where there is a GPU, plans are compiled in place: CUDA does not survive the compiler's fork.
"""

import logging
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import torch

import wantrt
from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import Flavour
from wantrt.engines.requests import PlanRequest
from wantrt.errors import BuildError
from wantrt.folder import Progress, silent
from wantrt.interrupt import stoppable
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

# No thread is handed blocks of another's heap because it freed them, and which blocks are large
# does not depend on what was freed before.
OWN_HEAP = "glibc.malloc.tcache_count=0:glibc.malloc.mmap_threshold=131072"

_lock = threading.Lock()
_idle: dict[tuple[int, str], list["_Compiler"]] = {}  # by process, which may fork, and flavour
_busy: set["_Compiler"] = set()


def build_apart(
    flavour: Flavour, request: PlanRequest, path: Path, progress: Progress = silent
) -> None:
    """Compile a plan into a file. Ctrl-C stops it at once. Raises what `build_plan` raises.

    Threads that compile at once have a process each.
    """
    if builds_in_place():
        with stoppable() as stopped:
            path.write_bytes(memoryview(build_plan(flavour, request, progress, stopped)))
        return
    compiler = _take_compiler(flavour)
    try:
        compiler.compile(request, path, progress)
    except BaseException:
        compiler.stop()
        raise
    finally:
        _give_back(compiler)


def builds_in_place() -> bool:
    return torch.cuda.is_available()


def stop_compilers() -> None:
    """Stop what other threads compile; there it is an error."""
    with _lock:
        for compiler in _busy:
            compiler.kill()


def _take_compiler(flavour: Flavour) -> "_Compiler":
    """An idle one of this process, or a new one, which is ready some seconds after its start."""
    with _lock:
        idle = _idle.setdefault((os.getpid(), flavour.name), [])
        while idle and not idle[-1].is_running():
            idle.pop().stop()
        compiler = idle.pop() if idle else _Compiler(flavour.name)
        _busy.add(compiler)
    return compiler


def _give_back(compiler: "_Compiler") -> None:
    with _lock:
        _busy.discard(compiler)
        if compiler.is_running():
            _idle[os.getpid(), compiler.flavour].append(compiler)


class _Compiler:
    """The other process, seen from here. It ends with this one, and when it is stopped."""

    def __init__(self, flavour: str) -> None:
        self.flavour = flavour
        self._socket, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wantrt.engines.compiler", flavour, str(theirs.fileno())],
                env={**os.environ, "GLIBC_TUNABLES": OWN_HEAP},
                pass_fds=[theirs.fileno()],
                cwd=Path(wantrt.__file__).parents[1],  # there it finds the same wantrt
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # a terminal's Ctrl-C is for us
            )

    def is_running(self) -> bool:
        return self._process.poll() is None

    def compile(self, request: PlanRequest, path: Path, progress: Progress) -> None:
        result: tuple[str, object] = ("ended", None)
        try:
            request = replace(request, graph=request.graph.absolute())
            self._socket.send_bytes(pickle.dumps((request, path.absolute())))
            while True:
                kind, content = self._socket.recv()
                if kind == "ended":
                    break
                if kind == "progress":
                    progress(*content)
                elif kind == "log":
                    name, level, message = content
                    logging.getLogger(name).log(level, "%s", message)
                else:
                    result = (kind, content)
        except (EOFError, ConnectionError):
            pass  # without a result
        kind, content = result
        if isinstance(content, BaseException):
            raise content
        if kind == "ended":
            raise BuildError(
                f"the process that compiled {request.component.name} ended without a word: the "
                "system may have killed it for its memory. Close other programs, or take a smaller "
                "--stack."
            )

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self.kill()
        self._process.wait()
        self._socket.close()
