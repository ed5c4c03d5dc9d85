"""Tests of kernels run twice: compiled where there is a GPU (marked `gpu`), and interpreted.

Triton decides at its import which of the two it does, so the interpreted run is a child process
with TRITON_INTERPRET=1 (test_interpreted.py) and nothing leaks into other tests.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if INTERPRETED else ["test_addresses.py"]  # which reaches into the interpreter


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kernel_device" in getattr(item, "fixturenames", ()) and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def kernel_device() -> str:
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture(autouse=True)
def nan_in_empty_tensors():
    """`torch.empty` gives NaN, so that an output which is not written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)
