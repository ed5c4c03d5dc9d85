"""The process that compiles kernels, with a cache that is empty at first."""

import os
from collections.abc import Iterator

import pytest

from wantrt.kernels import ptx
from wantrt.kernels.ptx import compile_kernel


@pytest.fixture(scope="module")
def empty_cache(tmp_path_factory) -> Iterator[None]:
    """For this process and its children; afterwards others get their own."""
    stop_compiler()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield
    stop_compiler()


def stop_compiler() -> None:
    compile_kernel.cache_clear()
    compiler = ptx._compilers.pop(os.getpid(), None)
    if compiler is not None:
        compiler.stop()
