"""The CUDA device: order, captured work, scratch memory. Small tensors, no model."""

import pytest
import torch

from wantrt.device import ALIGNMENT_BYTES, CUDADevice

pytestmark = pytest.mark.gpu

SIDE = 2048  # of a matrix whose product takes long enough to be overtaken


@pytest.fixture
def device() -> CUDADevice:
    return CUDADevice()


def make_matrices(device: CUDADevice) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device.torch_device).manual_seed(0)
    with device.stream():
        x = torch.randn(SIDE, SIDE, device=device.torch_device, generator=generator)
        return x, device.empty((SIDE, SIDE), torch.float32)


def test_a_replay_gives_the_same_bits(device):
    x, result = make_matrices(device)
    with device.stream():

        def work() -> None:
            result.copy_(x @ x)
            x.mul_(0.5)

        start = x.clone()
        work()
        work()
        expected = result.clone()
        x.copy_(start)
        replay = device.capture(work)
        assert torch.equal(x, start)  # recorded, not run
        replay()
        replay()
        assert torch.equal(result, expected)
    assert not device.capturing


def test_captured_works_share_the_memory_they_compute_in(device):
    x, result = make_matrices(device)

    def work() -> None:
        result.copy_(x @ x)  # a product of its own, then a copy

    with device.stream():
        work()
        expected = result.clone()
        first = device.capture(work)
        reserved = torch.cuda.memory_reserved()
        second = device.capture(work)
        assert torch.cuda.memory_reserved() - reserved < x.nbytes
        for replay in (first, second, first):
            result.zero_()
            replay()
            assert torch.equal(result, expected)
        del replay, first, second  # with the last graph its memory goes; the next one gets its own
        device.capture(work)()
        assert torch.equal(result, expected)


def test_a_refused_capture_leaves_the_device_as_it_was(device):
    x, result = make_matrices(device)

    def work() -> None:
        result.copy_(x * x.sum().item())  # the host cannot wait for what is not run

    def fail() -> None:
        result.copy_(x)
        raise ValueError("a session refuses")

    with device.stream():
        work()
        expected = result.clone()
        for refused in (work, fail):
            with pytest.raises((RuntimeError, ValueError)):
                device.capture(refused)
            assert not device.capturing
        result.zero_()
        work()
        assert torch.equal(result, expected)
        result.zero_()
        replay = device.capture(lambda: result.copy_(x))
        replay()
        assert torch.equal(result, x)


def test_copies_on_the_side_keep_the_order_of_events(device):
    """Two slots' worth of values through one slot, each used before the next overwrites it."""
    x, result = make_matrices(device)
    source = [device.pinned((SIDE, SIDE), torch.float32).fill_(value) for value in (1, 2, 3)]
    slot = device.empty((SIDE, SIDE), torch.float32)
    filled, unused = device.event(), device.event()
    sums = []
    with device.stream():
        for pinned in source:
            unused.record()
            with device.side_stream():
                unused.wait()
                slot.copy_(pinned, non_blocking=True)
                filled.record()
            filled.wait()
            result.copy_(x @ x)
            sums.append(slot.sum(dtype=torch.float64))
        assert [float(total) / SIDE**2 for total in sums] == [1, 2, 3]


def test_scratch_memory_is_aligned_and_stays_when_captured(device):
    device.scratch.reserve(1000)
    first, size = device.scratch.block()
    assert (first % ALIGNMENT_BYTES, size) == (0, 1000)
    x, result = make_matrices(device)
    with device.stream():
        device.capture(lambda: result.copy_(x))
    device.scratch.reserve(10_000_000)
    second, _ = device.scratch.block()
    assert second != first
    before = device.free_bytes()
    device.release()
    assert device.scratch.nbytes == 0
    assert device.free_bytes() >= before


def test_what_it_is_called(device):
    assert torch.cuda.get_device_name() in device.name
    assert "CUDA driver 1" in device.name
    assert device.architecture.startswith("sm")
    assert device.stream_handle != 0
