"""What the runtime does with a GPU, with torch sessions: graphs, streamed weights, one arena.

A captured step and captured chunks give the bits of eager ones; streamed stacks those of resident
ones. nano's dimensions, random weights.
"""

import gc
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gpu.nano import EXPERT, NANO, components, load, weights
from wantrt.device import ALIGNMENT_BYTES, CUDADevice, Device
from wantrt.models.components import Component
from wantrt.runtime.decoder import Decoder
from wantrt.runtime.denoiser import Denoiser, Stage, Transformer
from wantrt.runtime.loading import Files
from wantrt.runtime.residency import Part, Sessions
from wantrt.runtime.streaming import stream_sessions
from wantrt.runtime.torch_session import load_sessions
from wantrt.schedulers.grids import make_grid
from wantrt.session import Tensors

pytestmark = pytest.mark.gpu

STEPS = 6
DTYPES = [torch.float32, torch.bfloat16]


class Eager(CUDADevice):
    """Captures nothing."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


class Counting(CUDADevice):
    """Counts what was captured in earnest."""

    captured = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        replay = super().capture(work)
        self.captured += 1
        return replay


def denoise(
    device: Device,
    sessions: Sessions,
    seeds: Sequence[int] = (0,),
    scale: float = 3.0,
    captures: bool = True,
) -> list[Tensor]:
    """The latent [1, 16, 3, 8, 8] after each step of each run, on the CPU."""
    grid = make_grid("unipc", "official", STEPS, NANO.flow_shift)
    stages = [Stage(Transformer(EXPERT.dit, sessions), range(STEPS), scale)]
    denoiser = Denoiser(device, captures=captures)
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
        rows = (1, EXPERT.dit.text_len, EXPERT.dit.text_dim)
        embeds, negative = (torch.randn(rows, generator=generator) for _ in range(2))
        with torch.inference_mode(), device.stream():
            given = (t.to(device.torch_device) for t in (noise, embeds, negative))
            found += [latent.cpu() for latent in denoiser.run(stages, grid, "unipc", *given)]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 3.0], ids=["alone", "guided"])
def test_captured_steps_equal_eager_ones(
    dtype: torch.dtype, scale: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The second run has another prompt and seed, and replays from its first step on."""
    device, eager = Counting(), Eager()
    with caplog.at_level(logging.WARNING, logger="wantrt"):
        actual = denoise(device, load(EXPERT.name, dtype, device), seeds=(0, 1), scale=scale)
    expected = denoise(eager, load(EXPERT.name, dtype, eager), seeds=(0, 1), scale=scale)
    assert not caplog.records
    assert device.captured == 1
    assert all(map(torch.equal, actual, expected))
    assert not torch.equal(actual[STEPS - 1], actual[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_captured_chunks_equal_eager_ones(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight latent frames, so that both banks are replayed; then another video."""

    def decode(device: Device) -> list[Tensor]:
        decoder = Decoder(NANO.vae, load("vae", dtype, device), device)
        found = []
        for seed in (0, 1):
            latent = torch.randn(1, 16, 8, 8, 8, generator=torch.Generator().manual_seed(seed))
            with torch.inference_mode(), device.stream():
                pixels = decoder.decode(latent.to(device.torch_device))
                found += [chunk.cpu() for chunk in pixels]
        return found

    device = Counting()
    with caplog.at_level(logging.WARNING, logger="wantrt"):
        actual = decode(device)
    assert not caplog.records
    assert device.captured == 2
    assert all(map(torch.equal, actual, decode(Eager())))


@pytest.mark.parametrize("stack", [1, 2, 3], ids=["6 stacks", "3 stacks", "2 stacks"])
def test_streamed_stacks_equal_resident_ones(stack: int) -> None:
    device = CUDADevice()
    host = weights(EXPERT.name, torch.bfloat16)

    def load_here(component: Component, _: Files, given: Tensors, device: Device) -> Sessions:
        return load_sessions(component, None, given, device)

    def sessions(streamed: bool) -> Sessions:
        found = {}
        for component in components(EXPERT.name, torch.bfloat16, stack):
            streams = streamed and component.name == "dit_stack"
            found[component.name] = (
                stream_sessions(component, Files(Path("none")), load_here, host, device)
                if streams
                else load_sessions(component, None, host, device)
            )
        return found

    with torch.inference_mode(), device.stream():
        expected = denoise(device, sessions(streamed=False), seeds=(0, 1))
        actual = denoise(device, sessions(streamed=True), seeds=(0, 1), captures=False)
    assert all(map(torch.equal, actual, expected))


def test_a_phase_gives_its_memory_back() -> None:
    device = CUDADevice()
    part = Part(lambda: load(EXPERT.name, torch.bfloat16, device), device, resident=False)

    def after_a_phase() -> int:
        denoise(device, part)
        assert part._sessions is not None
        part.leave()
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    once = after_a_phase()  # with what libraries allocate once: cuBLAS its workspace
    weights_bytes = sum(t.nbytes for t in weights(EXPERT.name, torch.bfloat16).values())
    assert after_a_phase() - once < weights_bytes / 10


def test_a_graph_keeps_its_scratch_when_the_arena_grows() -> None:
    device = CUDADevice()
    out = torch.zeros(1024, device="cuda")

    def work() -> None:
        address, nbytes = device.scratch.block()
        assert address % ALIGNMENT_BYTES == 0
        assert nbytes >= out.nbytes
        block = device.scratch._block
        assert block is not None
        scratch = block[address - block.data_ptr() :][: out.nbytes].view(torch.float32)
        scratch.copy_(out)
        out.copy_(scratch + 1)

    device.scratch.reserve(out.nbytes)
    torch.cuda.synchronize()
    with device.stream():
        work()
        replay = device.capture(work)
        before = device.scratch.block()
        device.scratch.reserve(2**24)
        assert device.scratch.block() != before
        torch.full((2**20,), 7.0, device="cuda")  # would take the old block's memory
        replay()
        device.synchronize()
    assert out.cpu().tolist() == [2.0] * 1024


def test_is_a_plan_of_tensorrt_rtx_valid_here(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Of all targets that it compiles for. Hopper (sm90) is in none of its lists: what does it say?

    The answer is printed and stands in the report of the test; only a listed GPU must be served.
    """
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    pytest.importorskip("onnx", reason="graphs need onnx")
    from tests.engines.plans import make_request
    from wantrt.engines.builder import build_plan
    from wantrt.engines.flavours import DEFAULT_TARGETS, find_flavour

    flavour, device = find_flavour("tensorrt-rtx"), CUDADevice()
    (head,) = (c for c in components(EXPERT.name, torch.bfloat16) if c.name == "dit_head")
    sizes = {"B": 1, "F": 2, "h": 4, "w": 4}
    request = make_request(
        head, tmp_path, {name: (n, n, n) for name, n in sizes.items()}, DEFAULT_TARGETS
    )
    plan = bytes(memoryview(build_plan(flavour, request)))
    valid = not flavour.is_invalid(flavour.runtime(), plan)
    answer = f"{device.name}, {device.architecture}: {'valid' if valid else 'invalid'}"
    print(f"a plan of TensorRT-RTX {flavour.version} for {', '.join(DEFAULT_TARGETS)} on {answer}")
    record_property("tensorrt_rtx_plan", answer)
    if device.architecture in DEFAULT_TARGETS:
        assert valid
