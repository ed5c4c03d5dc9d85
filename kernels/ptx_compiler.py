"""The process that compiles kernels for another: `python -m wantrt.kernels.ptx_compiler FD`.

It answers every `Source` that comes through the socket FD with a `Kernel`, or with the reason why
there is none (kernels/ptx.py), and ends when the other end is closed.

Triton's PTX is made for Triton's launcher. For another one it needs what is done here: the
parameters that only Triton's launcher passes are taken away, pointers are said to be aligned
(launched by Triton they are looked at), and the entry gets a name of its own.
"""

import re
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from hashlib import sha256
from importlib import import_module
from multiprocessing.connection import Connection

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wantrt.kernels.ptx import Kernel, Source
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

WARP = 32
LARGEST_SHARED_BYTES = 48 * 2**10  # more must be asked for at launch, and nobody would
NAME_DIGITS = 16
FIRST_ARCH_LOCKED = 90  # from here on Triton compiles for sm_90a, which runs on no other GPU
ENTRY = re.compile(r"(\.visible \.entry (\w+)\()(.*?)(\n\))", re.DOTALL)
PARAMETER_TYPES = {"*": (".u64", ".b64"), "i": (".u32", ".b32")}  # by how the argument's begins


class RefusedError(Exception):
    """A kernel that cannot be a plugin."""


def compile_source(source: Source, sm: int, ptx_version: int) -> Kernel:
    """Raises RefusedError, and what Triton raises."""
    function = getattr(import_module(source.module), source.kernel)
    types, constants = dict(source.types), dict(source.constants)
    passed = [name for name in function.arg_names if name in types]
    absent = {name: None for name in function.arg_names if name not in {*types, *constants}}
    compiled = triton.compile(
        ASTSource(
            function,
            {name: types.get(name, "constexpr") for name in function.arg_names},
            {**absent, **constants},
            {
                (function.arg_names.index(name),): [["tt.divisibility", 16]]
                for name in source.aligned
            },
        ),
        target=GPUTarget("cuda", sm, WARP),
        options={
            "num_warps": source.num_warps,
            "ptx_version": ptx_version,
            "enable_fp_fusion": True,  # as assemblers do by default, and whoever loads PTX
        },
    )
    metadata = compiled.metadata
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if size := getattr(metadata, kind, 0):
            raise RefusedError(f"it wants {size} bytes of scratch memory ({kind})")
    if metadata.shared > LARGEST_SHARED_BYTES:
        raise RefusedError(
            f"it wants {metadata.shared} bytes of shared memory, of {LARGEST_SHARED_BYTES}"
        )
    ptx = remove_hidden_parameters(compiled.asm["ptx"], [types[name] for name in passed])
    if ".file" in ptx:
        raise RefusedError("its PTX names source files, which lie elsewhere on another machine")
    name = f"wantrt_{source.kernel}_{sha256(ptx.encode()).hexdigest()[:NAME_DIGITS]}"
    ptx = re.sub(rf"\b{metadata.name}(?=\b|_param_)", name, ptx)
    assemble(ptx, sm)
    return Kernel(name, ptx, metadata.shared, source.num_warps * WARP)


def remove_hidden_parameters(ptx: str, types: list[str]) -> str:
    """PTX without the pointers to scratch memory, which Triton's launcher alone passes.

    types: of the arguments. Raises RefusedError unless these are the first parameters, and none of
    the others is used.
    """
    (entry,) = ENTRY.finditer(ptx)
    parameters = [line.strip() for line in entry[3].split(",")]
    kept, hidden = parameters[: len(types)], parameters[len(types) :]
    if len(kept) < len(types):
        raise RefusedError(f"its entry has {len(kept)} parameters for {len(types)} arguments")
    for parameter, type_ in zip(kept, types, strict=True):
        if parameter.split()[1] not in PARAMETER_TYPES[type_[0]]:
            raise RefusedError(f"its entry takes {parameter} for an argument of type {type_}")
    for parameter in hidden:
        name = parameter.split()[-1]
        if re.search(rf"\b{name}\b", ptx[entry.end() :]):
            raise RefusedError(f"it uses {parameter}, which nobody passes")
    listed = ",\n\t".join(kept)
    return f"{ptx[: entry.start()]}{entry[1]}\n\t{listed}{entry[4]}{ptx[entry.end() :]}"


def assemble(ptx: str, sm: int) -> str:
    """What the assembler says of PTX: registers, spills. Raises RefusedError if it takes it not."""
    target = f"sm_{sm}{'a' if sm >= FIRST_ARCH_LOCKED else ''}"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target}", file.name]
        done = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True)
    if done.returncode:
        raise RefusedError(f"the assembler refuses its PTX: {done.stderr or done.stdout}")
    return done.stderr


def serve(socket: Connection) -> None:
    while True:
        request = socket.recv()
        try:
            answer: Kernel | str = compile_source(*request)
        except RefusedError as error:
            answer = str(error)
        except Exception as error:
            answer = "".join(traceback.format_exception_only(error)).strip()
        socket.send(answer)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
    with suppress(EOFError, ConnectionError):
        serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
