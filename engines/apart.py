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

_one_at_a_time = threading.Lock()
_compilers: dict[tuple[int, str], "_Compiler"] = {}  # by process, which may fork, and flavour


def build_apart(
    flavour: Flavour, request: PlanRequest, path: Path, progress: Progress = silent
) -> None:
    """Compile a plan into a file. Ctrl-C stops it at once. Raises what `build_plan` raises."""
    if builds_in_place():
        with stoppable() as stopped:
            path.write_bytes(memoryview(build_plan(flavour, request, progress, stopped)))
        return
    with _one_at_a_time:
        compiler = _find_compiler(flavour)
        try:
            compiler.compile(request, path, progress)
        except BaseException:
            compiler.stop()
            raise


def builds_in_place() -> bool:
    return torch.cuda.is_available()


def _find_compiler(flavour: Flavour) -> "_Compiler":
    """This process's compiler, which is ready some seconds after its start."""
    key = (os.getpid(), flavour.name)
    compiler = _compilers.get(key)
    if compiler is None or not compiler.is_running():
        compiler = _compilers[key] = _Compiler(flavour.name)
    return compiler


class _Compiler:
    """The other process, seen from here. It ends with this one, and when it is stopped."""

    def __init__(self, flavour: str) -> None:
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

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()
