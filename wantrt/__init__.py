"""Wan videos from text, images and masks, through exported graphs.

    from wantrt import Pipeline

    with Pipeline.load("my-bundle") as pipe:
        pipe("a cat surfing", seed=42).save("cat.mp4")

Importing this package imports none of torch, ONNX Runtime or TensorRT: each public name is loaded
when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wantrt import errors as errors
    from wantrt.config import VARIANTS as VARIANTS
    from wantrt.media import Video as Video
    from wantrt.runtime.pipeline import Pipeline as Pipeline

__version__ = "0.1.0"

_HOME = {  # public name -> the module that defines it; a module stands for itself
    "Pipeline": "wantrt.runtime.pipeline",
    "Video": "wantrt.media",
    "VARIANTS": "wantrt.config",
    "errors": "wantrt.errors",
}

__all__ = ["VARIANTS", "Pipeline", "Video", "__version__", "errors"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'wantrt' has no attribute {name!r}")
    module = import_module(_HOME[name])
    value = globals()[name] = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
