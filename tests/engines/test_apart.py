"""A plan compiled apart: the same bytes whatever the process did before, and gone when stopped."""

import ctypes
import json
import mmap
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE

import pytest
import torch

from tests.engines.plans import components, make_request
from tests.export.components import make_components
from wantrt.engines.apart import build_apart
from wantrt.engines.flavours import Flavour, find_flavour
from wantrt.engines.requests import PlanRequest
from wantrt.errors import BuildError
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.folder import sha256_of

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="where there is a GPU, plans are compiled in place"
)
ROOT = Path(__file__).parents[2]
ALONE = "baked vae_encoder_first"  # of all plans the one whose bytes differ most easily


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return find_flavour("tensorrt-rtx")


@pytest.fixture
def request_(tmp_path: Path) -> PlanRequest:
    """Many inputs and outputs, whose order in the plan is what may differ."""
    component = components("reduced")["vae_decoder_next"]
    symbols = {"h": (4, 4, 4), "w": (4, 4, 4)}
    return make_request(component, tmp_path, symbols, targets=("sm89",), baked=True)


def disturb(seed: int) -> list[object]:
    """Leave holes of all sizes, in the heap and in the address space, as the result lives."""
    chance = random.Random(seed)
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(chance.choice((24, 40, 100, 500, 5000))) for _ in range(20_000)]
    for block in chance.sample(blocks, len(blocks) // 2):
        libc.free(block)
    sizes = [2 ** chance.randrange(12, 28) for _ in range(50)]
    return chance.sample([mmap.mmap(-1, size) for size in sizes], 25)


def hashes(folder: Path, seed: int, *names: str, env: Mapping[str, str] | None = None) -> object:
    """The sha256 of plans that a process of its own compiles; see `main` below."""
    command = [sys.executable, "-m", "tests.engines.test_apart", str(folder), str(seed), *names]
    return json.loads(subprocess.run(command, check=True, stdout=PIPE, cwd=ROOT, env=env).stdout)


@pytest.mark.slow
def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """All of nano's plans, in any order, after any others, in any environment; and one alone."""
    elsewhere = tmp_path / "of another length" / "elsewhere"
    elsewhere.mkdir(parents=True)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "LC_ALL": "C", "LONG": "x" * 5000}
    whole = hashes(tmp_path, 0)
    assert len(whole) > 20
    assert hashes(elsewhere, 1, env=environment) == whole
    assert hashes(elsewhere, 2, ALONE, env=environment) == {ALONE: whole[ALONE]}


def test_the_same_bytes_whatever_was_before(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path
) -> None:
    found, kept = set(), []
    for seed in range(3):
        build_apart(flavour, request_, tmp_path / "plan")
        found.add(sha256_of(tmp_path / "plan"))
        kept.append(disturb(seed))
    assert len(found) == 1


@pytest.mark.parametrize("name", ["vae_encoder_first", "dit_stack", "text_stack"])
def test_a_component_that_has_run_looks_the_same_to_the_compiler(name: str, tmp_path: Path) -> None:
    """A build that resumes has not exported it: whatever else is unpickled moves the heap."""
    component = make_components(torch.bfloat16, ONNX_OPS)[name]  # new ones
    before = pickle.dumps(component)
    export_component(component, tmp_path / "graph.onnx")
    assert pickle.dumps(component) == before


def test_progress_and_errors_come_through(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path
) -> None:
    heard: list[int] = []
    build_apart(flavour, request_, tmp_path / "plan", lambda what, done, of: heard.append(done))
    assert heard
    assert heard == sorted(heard)
    request_.graph.write_bytes(request_.graph.read_bytes()[:1000])
    with pytest.raises(BuildError, match=r"wantrt build --check"):
        build_apart(flavour, request_, tmp_path / "plan")


def test_ctrl_c_stops_it_at_once(flavour: Flavour, request_: PlanRequest, tmp_path: Path) -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        while True:  # it may be quicker than that
            build_apart(flavour, request_, tmp_path / "plan")
    assert time.perf_counter() - start < 5
    assert compilers() == []


def test_a_killed_compiler_is_an_error_and_the_next_plan_gets_another(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path
) -> None:
    def kill_child(what: str, done: int, of: int) -> None:
        with suppress(IndexError, ProcessLookupError):  # it hears of some percents after the end
            os.kill(children(compilers()[0])[0], signal.SIGKILL)

    def kill_server(what: str, done: int, of: int) -> None:
        with suppress(IndexError):  # and so here
            os.kill(compilers()[0], signal.SIGKILL)

    for kill in (kill_child, kill_server):
        with pytest.raises(BuildError, match="ended without a word"):
            build_apart(flavour, request_, tmp_path / "plan", kill)
    build_apart(flavour, request_, tmp_path / "plan")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "tests.engines.test_apart", str(tmp_path), "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    family: list[int] = []
    while len(family) < 2:  # until the compiler has a child that compiles
        assert process.poll() is None
        family = children(process.pid)
        family += [grandchild for child in family for grandchild in children(child)]
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def compilers() -> list[int]:
    return [pid for pid in children(os.getpid()) if b"wantrt.engines.compiler" in command_of(pid)]


def command_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def main(folder: Path, seed: int, names: Sequence[str]) -> None:
    """Compile nano's plans (none named: all) in some order, disturbed; print their hashes."""
    every = components("nano")
    kinds = [("baked", name) for name in every]
    kinds += [("bound", name) for name in every if not name.startswith("vae_")]
    if names:
        kinds = [(kind, name) for kind, name in kinds if f"{kind} {name}" in names]
    random.Random(seed).shuffle(kinds)
    kept, found = [disturb(seed)], {}
    plan = folder / "plan"
    for kind, name in kinds:
        component = every[name]
        declared = {symbol for spec in component.inputs.values() for symbol in spec.symbol_names}
        symbols = dict.fromkeys(sorted(declared), (2, 2, 2))
        baked = kind == "baked"
        request = make_request(component, folder, symbols, targets=("sm89",), baked=baked)
        build_apart(find_flavour("tensorrt-rtx"), request, plan)
        found[f"{kind} {name}"] = sha256_of(plan)
        kept.append(disturb(seed + len(found)))
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
