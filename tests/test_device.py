"""Scratch memory that everything shares; the device of a machine without a GPU."""

import pytest
import torch

from wantrt.device import ALIGNMENT_BYTES, Arena, CPUDevice


@pytest.fixture
def blocks():
    """The sizes that an arena asked for."""
    return []


@pytest.fixture
def arena(blocks):
    def allocate(nbytes: int) -> torch.Tensor:
        blocks.append(torch.empty(nbytes, dtype=torch.uint8))
        return blocks[-1]

    return Arena(allocate)


def test_the_largest_need_is_allocated_once(arena, blocks):
    for need in (1000, 5000, 3000):
        arena.reserve(need)
    assert blocks == []  # at the first use
    address, size = arena.block()
    assert size == 5000
    assert address % ALIGNMENT_BYTES == 0
    inside = range(blocks[0].data_ptr(), blocks[0].data_ptr() + len(blocks[0]) + 1)
    assert address in inside
    assert address + size in inside
    arena.reserve(4000)
    assert arena.block() == (address, size)
    assert len(blocks) == 1


def test_a_larger_need_gets_a_new_block(arena, blocks):
    arena.reserve(1000)
    first, _ = arena.block()
    arena.reserve(9000)
    second, size = arena.block()
    assert size == 9000
    assert second != first
    assert len(blocks) == 2


def test_a_captured_block_stays(arena, blocks):
    """The graph holds its address; what comes later has another."""
    arena.reserve(1000)
    arena.block()
    held = torch.multiprocessing.reductions.StorageWeakRef(blocks[0].untyped_storage())
    arena.freeze()
    arena.reserve(9000)
    arena.block()
    blocks.clear()
    assert not held.expired()


def test_a_block_that_nothing_captured_is_freed_first(arena, blocks):
    arena.reserve(1000)
    arena.block()
    held = torch.multiprocessing.reductions.StorageWeakRef(blocks[0].untyped_storage())
    blocks.clear()
    arena.reserve(9000)
    arena.block()
    assert held.expired()


def test_a_cpu_needs_no_order_and_captures_nothing():
    device, ran = CPUDevice(), []
    with device.stream(), device.side_stream():
        event = device.event()
        event.record()
        event.wait()
    replay = device.capture(lambda: ran.append(1))
    assert ran == []  # it has run once already
    replay()
    assert ran == [1]
    assert not device.capturing
    assert device.free_bytes() > 2**20


def test_release_forgets_the_scratch_block():
    device = CPUDevice()
    device.scratch.reserve(1000)
    device.scratch.block()
    device.release()
    assert device.scratch.nbytes == 0
