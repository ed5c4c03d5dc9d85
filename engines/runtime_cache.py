"""TensorRT-RTX's runtime cache: the kernels that it compiles when a context is made, on disk.

One file a plan, in a folder of its GPU and driver. TensorRT checks what it reads against the
machine; a file that it refuses costs the time to compile again, nothing else.
"""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from wantrt.device import Device
from wantrt.engines import api
from wantrt.engines.flavours import Flavour
from wantrt.folder import cache_folder, write_atomic
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

log = logging.getLogger("wantrt")


@dataclass
class RuntimeCacheFile:
    """A runtime cache and its file; `save` when kernels may have been compiled."""

    cache: api.RTXRuntimeCache
    path: Path
    kept: bytes  # what the file holds

    @classmethod
    def attach(
        cls, flavour: Flavour, config: api.RuntimeConfig, device: Device, plan: str
    ) -> "RuntimeCacheFile | None":
        """Give `config` the cache of a plan (its sha256); None if the flavour has no such thing."""
        rtx_config = flavour.rtx_runtime_config(config)
        if rtx_config is None:
            return None
        made = rtx_config.create_runtime_cache()
        if made is None:
            log.warning("TensorRT makes no runtime cache: %s", flavour.last_errors())
            return None
        folder = re.sub(r"[^A-Za-z0-9.]+", "-", f"{device.name} {flavour.version}")
        path = cache_folder() / "runtime-cache" / folder / plan
        loaded = path.read_bytes() if path.is_file() else b""
        if loaded and not made.deserialize(loaded):
            log.warning("%s is not for this machine or damaged: kernels compile again", path)
            flavour.last_errors()  # they are no cause of what may fail later
            loaded = b""
        if not rtx_config.set_runtime_cache(made):
            log.warning("TensorRT refuses a runtime cache: %s", flavour.last_errors())
            return None
        return cls(made, path, loaded)

    def save(self) -> None:
        """Write the file if there is anything new."""
        kernels = self.cache.serialize()
        content = b"" if kernels is None else bytes(kernels)
        if content and content != self.kept:
            try:
                write_atomic(self.path, content)
                self.kept = content
            except OSError as error:
                log.warning("cannot keep compiled kernels in %s: %s", self.path, error)
