"""Put the fakes where the product finds the real things."""

import sys

import pytest

from tests.engines.fake.device import FakeDevice
from tests.engines.fake.tensorrt import Runtime, make_module
from wantrt.engines import apart
from wantrt.engines.flavours import Flavour, find_flavour


def install_tensorrt_rtx(monkeypatch: pytest.MonkeyPatch) -> Flavour:
    """TensorRT-RTX is the fake, as long as `monkeypatch` lasts."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", make_module("tensorrt_rtx"))
    monkeypatch.setattr(Runtime, "refuses", set())
    monkeypatch.setattr(apart, "builds_in_place", lambda: True)  # a fake does not go elsewhere
    find_flavour.cache_clear()
    return find_flavour("tensorrt-rtx")


__all__ = ["FakeDevice", "install_tensorrt_rtx"]
