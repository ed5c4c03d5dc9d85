"""Triton kernels as PTX, for any GPU and without one, compiled in a process of their own.

LLVM aborts the process where it cannot go on, so another one compiles (ptx_compiler.py): it is
started once, serves request after request, and where it dies the kernel that killed it is named.
Triton keeps what it compiled in its own cache, by content.
"""

import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from multiprocessing import Pipe
from pathlib import Path

import wantrt
from wantrt.errors import BuildError
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

# The oldest PTX that LLVM has for a GPU, so that old drivers read it too: Triton's own choice is as
# new as its assembler, and drivers refuse what is newer than they are.
PTX_VERSIONS = {80: 86, 86: 86, 89: 86, 90: 86, 100: 86, 103: 88, 120: 87, 121: 88}
OURS = ("TRITON_CACHE_DIR", "TRITON_HOME")  # all else in Triton's environment changes the code
ERROR_LINES = 6

_one_at_a_time = threading.Lock()
_compilers: dict[int, "_Compiler"] = {}  # by process, which may fork


@dataclass(frozen=True)
class Source:
    """What to compile: a kernel, by name so that another process finds it, and its arguments.

    types: of the arguments that are passed, in order, "*bf16" or "i32". constants: the constexprs;
    pointers in neither are None. aligned: arguments that are multiples of 16.
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | float | bool], ...]
    aligned: tuple[str, ...]
    num_warps: int


@dataclass(frozen=True)
class Kernel:
    """Compiled. name: of its entry, of which no other kernel has the same."""

    name: str
    ptx: str
    shared_bytes: int  # dynamic
    num_threads: int


@cache
def compile_kernel(source: Source, sm: int) -> Kernel:
    """PTX for GPUs of compute capability `sm`, 90 for 9.0.

    Raises BuildError for a kernel that does not compile, or cannot be launched by TensorRT.
    """
    if sm not in PTX_VERSIONS:
        known = ", ".join(f"sm{known}" for known in PTX_VERSIONS)
        raise BuildError(f"kernels are compiled for {known}, not for sm{sm}: build without plugins")
    return _ask(source, sm, PTX_VERSIONS[sm])


def _ask(source: Source, sm: int, ptx_version: int) -> Kernel:
    what = f"{source.kernel} for sm{sm}"
    with _one_at_a_time:
        compiler = _compilers.get(os.getpid())
        if compiler is None:
            compiler = _compilers[os.getpid()] = _Compiler()
        try:
            result = compiler.compile(source, sm, ptx_version)
        except (EOFError, ConnectionError):
            del _compilers[os.getpid()]
            raise BuildError(f"Triton crashed on the kernel {what}:\n{compiler.ending()}") from None
        except BaseException:  # an answer that nobody waited for must not be taken for the next
            del _compilers[os.getpid()]
            compiler.stop()
            raise
    if isinstance(result, str):
        raise BuildError(f"the kernel {what} cannot be a plugin: {result}")
    return result


class _Compiler:
    """The other process, seen from here. It ends when this one does."""

    def __init__(self) -> None:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in OURS or not name.startswith("TRITON_")
        }
        environment["TRITON_DISABLE_LINE_INFO"] = "1"  # it names paths of this machine
        self._socket, theirs = Pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115  `ending` closes it
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wantrt.kernels.ptx_compiler", str(theirs.fileno())],
                env=environment,
                pass_fds=[theirs.fileno()],
                cwd=Path(wantrt.__file__).parents[1],  # there it finds the same wantrt
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                process_group=0,  # a terminal's Ctrl-C is for us
            )

    def compile(self, source: Source, sm: int, ptx_version: int) -> Kernel | str:
        """The kernel, or why it is none. Raises EOFError where the process died of it."""
        self._socket.send((source, sm, ptx_version))
        result: Kernel | str = self._socket.recv()
        return result

    def ending(self) -> str:
        """What the process said last, and how it ended."""
        status = self._process.wait()
        self._socket.close()
        with self._stderr as file:
            file.seek(0)
            lines = file.read().decode(errors="replace").splitlines()
        return "\n".join([*lines[-ERROR_LINES:], f"(exit status {status})"])

    def stop(self) -> None:
        self._process.kill()
        self.ending()
