"""Tests that take `kernel_device` run compiled on a GPU, and interpreted in test_interpreted.py."""

from tests.kernels.conftest import kernel_device, pytest_collection_modifyitems

__all__ = ["kernel_device", "pytest_collection_modifyitems"]
