"""The receipt of a build: what was asked, by which code, of which files.

Importing torch takes longer than a build that has nothing to do. A build leaves its receipt in the
build log; when the next one is asked for the same, of files that have not been touched since, it is
done. Any doubt (a checkpoint from the network, another GPU, a changed module) means the long way.
Imports nothing heavy.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

from wantrt.bundle import BUILD_LOG
from wantrt.config import SHIPPED, find_variant
from wantrt.experts import is_list_of_experts, parse_experts
from wantrt.pieces import is_untouched, read_log

PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "triton",
    "safetensors",
)  # their names begin so


def write_receipt(asked: Mapping[str, object]) -> str | None:
    """The receipt for what is asked now (the arguments of `plan_build`); None: cannot be said."""
    files: dict[str, tuple[int, int, int]] = {}
    for source in _find_sources(asked):
        stamps = _stamps(Path(source)) if source and os.path.isdir(source) else {}
        if not stamps and not (source or "").startswith("random:"):
            return None
        files |= stamps
    content = {
        "asked": {name: str(value) for name, value in asked.items()},
        "code": _stamps(Path(__file__).parent, "*.py"),
        "packages": _packages(),
        "gpus": sorted(str(path) for path in Path("/proc/driver/nvidia/gpus").glob("*")),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "files": files,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_done(out: Path | None, receipt: str | None) -> Path | None:
    """The finished, untouched bundle that was built under this receipt, in `out` or (None) here."""
    if receipt is None:
        return None
    for root in [out] if out else sorted(log.parent for log in Path().glob(f"*/{BUILD_LOG}")):
        log = read_log(root)
        if log and log.receipt == receipt and is_untouched(root, log):
            return root
    return None


def _find_sources(asked: Mapping[str, object]) -> list[str | None]:
    """The folder of each checkpoint, or random:SEED. None: it may have to be downloaded."""
    source = str(asked.get("experts") or asked.get("checkpoint") or "")
    if is_list_of_experts(source):
        return [_find_local(one.checkpoint) for one in parse_experts(source)]
    if not source:
        variant = find_variant(str(asked.get("variant")))
        source = str(SHIPPED.get(variant.name) or variant.repo_id or "")
    return [_find_local(source)]


def _find_local(source: str) -> str | None:
    if not source:
        return None
    if source.startswith("random:") or os.path.isdir(source):
        return source
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(source, local_files_only=True)
    except (OSError, ValueError):  # not there, or no repository's name
        return None


def _stamps(root: Path, pattern: str = "*") -> dict[str, tuple[int, int, int]]:
    """Of all files below a folder, and below links in it: size, time of change, inode."""
    found = {}
    for folder, _, names in os.walk(root, followlinks=True):
        for path in sorted(Path(folder, name) for name in names):
            if path.match(pattern) and path.is_file():
                status = path.stat()
                found[str(path)] = (status.st_size, status.st_mtime_ns, status.st_ino)
    return found


@cache
def _packages() -> list[str]:
    """Names and versions of what takes part in a build."""
    found = {f"{d.name} {d.version}" for d in distributions() if d.name.startswith(PACKAGES)}
    return sorted(found)
