"""A plan compiled apart: the same bytes whatever the process did before, and gone when stopped."""

import ctypes
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.engines.plans import components, make_request
from wantrt.engines.apart import build_apart
from wantrt.engines.flavours import Flavour, find_flavour
from wantrt.engines.requests import PlanRequest
from wantrt.errors import BuildError
from wantrt.folder import sha256_of

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="no fork where CUDA may be in use"
)


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return find_flavour("tensorrt-rtx")


@pytest.fixture
def request_(tmp_path: Path) -> PlanRequest:
    """Many inputs and outputs, whose order in the plan is what may differ."""
    component = components("reduced")["vae_decoder_next"]
    symbols = {"h": (4, 4, 4), "w": (4, 4, 4)}
    return make_request(component, tmp_path, symbols, targets=("sm89",), baked=True)


def fragment_heap() -> None:
    """Leave holes of all sizes."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(random.choice((24, 40, 100, 500, 5000))) for _ in range(20_000)]
    for block in random.sample(blocks, len(blocks) // 2):
        libc.free(block)


def test_the_same_bytes_whatever_was_before(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path
) -> None:
    hashes = set()
    for _ in range(3):
        build_apart(flavour, request_, tmp_path / "plan")
        hashes.add(sha256_of(tmp_path / "plan"))
        fragment_heap()
    assert len(hashes) == 1


def test_progress_and_errors_come_through(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path
) -> None:
    heard: list[int] = []
    build_apart(flavour, request_, tmp_path / "plan", lambda what, done, of: heard.append(done))
    assert heard
    assert heard == sorted(heard)
    request_.graph.write_bytes(request_.graph.read_bytes()[:1000])
    with pytest.raises(Exception, match=r"(?i)pars|graph"):
        build_apart(flavour, request_, tmp_path / "plan")


def test_ctrl_c_stops_it_at_once(flavour: Flavour, request_: PlanRequest, tmp_path: Path) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        while True:  # it may be quicker than that
            build_apart(flavour, request_, tmp_path / "plan")
    assert time.perf_counter() - start < 5
    with pytest.raises(ChildProcessError):  # none is left
        os.waitpid(-1, os.WNOHANG)


def test_a_killed_compiler_is_an_error(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path
) -> None:
    def kill(what: str, done: int, of: int) -> None:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)

    with pytest.raises(BuildError, match="ended without a word"):
        build_apart(flavour, request_, tmp_path / "plan", kill)
