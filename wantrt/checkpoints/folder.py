"""A checkpoint folder: finds files in it, and never reads one that lies outside of it."""

import json
from pathlib import Path
from typing import Any

from wantrt.checkpoints.tensors import PickledTensors, SafetensorsFiles, StoredTensors
from wantrt.errors import CheckpointError


class Folder:
    """A folder whose files are reached by relative paths that cannot leave it.

    Links out of it are refused. A snapshot of the Hugging Face cache is all links, to the ``blobs``
    beside ``snapshots``, so there the model's whole cache folder is the border.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        real = path.resolve()
        in_cache = real.parent.name == "snapshots" and (real.parents[1] / "blobs").is_dir()
        self._border = real.parents[1] if in_cache else real

    def file(self, name: str) -> Path | None:
        """The file at a relative path, None if there is none."""
        path = self.path / name
        if not path.resolve().is_relative_to(self._border):
            raise CheckpointError(
                f"{path} leads out of the checkpoint folder {self.path}. "
                "Expected files inside it; put a copy there."
            )
        return path if path.is_file() else None

    def json(self, name: str) -> dict[str, Any] | None:
        """The object in a JSON file, None if there is no such file."""
        path = self.file(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds no JSON object. Expected one, with named fields.")
        return content

    def tensors(self, stem: str) -> StoredTensors | None:
        """The tensors of `stem`: an index with its shards, one safetensors file, or a ``.pth``.

        `stem` is a relative path that may end in a wildcard. None if nothing of it is there.
        """
        if index := self._one(f"{stem}.safetensors.index.json"):
            return SafetensorsFiles(self._shards(index))
        if single := self._one(f"{stem}.safetensors"):
            return SafetensorsFiles([single])
        if pickled := self._one(f"{stem}.pth"):
            return PickledTensors(pickled)
        return None

    def _one(self, pattern: str) -> Path | None:
        found = sorted(self.path.glob(pattern))
        if len(found) > 1:
            raise CheckpointError(
                f"{' and '.join(path.name for path in found)} both lie in {found[0].parent}. "
                f"Expected one file {pattern}; move the others away."
            )
        return self.file(found[0].relative_to(self.path).as_posix()) if found else None

    def _shards(self, index: Path) -> list[Path]:
        folder = index.parent.relative_to(self.path)
        content = self.json(index.relative_to(self.path).as_posix()) or {}
        weight_map = content.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index} has no weight_map. Expected tensor name -> shard.")
        shards = {
            name: self.file((folder / str(name)).as_posix())
            for name in sorted({str(shard) for shard in weight_map.values()})
        }
        if missing := [name for name, path in shards.items() if path is None]:
            raise CheckpointError(
                f"{index.parent} lacks {len(missing)} of the {len(shards)} files that {index.name} "
                f"names: {', '.join(missing)}. Download or copy them too."
            )
        return [path for path in shards.values() if path is not None]
