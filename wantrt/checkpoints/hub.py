"""Checkpoints by repository id, from the local Hugging Face cache; downloaded only if missing."""

from collections.abc import Callable
from pathlib import Path

from wantrt.checkpoints.checkpoint import Checkpoint
from wantrt.errors import CheckpointError

# All that is read, in either layout; repositories hold examples and other encoders besides.
NEEDED_FILES = [
    "config.json",
    "model_index.json",
    "diffusion_pytorch_model*",
    "*_VAE.*",
    "models_t5*",
    "models_clip*",
    "google/umt5-xxl/*",
    "high_noise_model/*",
    "low_noise_model/*",
    "scheduler/*",
    "text_encoder/*",
    "image_encoder/*",
    "tokenizer/*",
    "transformer/*",
    "transformer_2/*",
    "vae/*",
]


def fetch(repo_id: str, open_folder: Callable[[Path], Checkpoint]) -> Checkpoint:
    """Open a repository's snapshot: the cached one if it is complete, else after a download."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    incomplete = None
    try:
        cached = snapshot_download(repo_id, allow_patterns=NEEDED_FILES, local_files_only=True)
        return open_folder(Path(cached))
    except LocalEntryNotFoundError:
        pass
    except CheckpointError as error:
        incomplete = error
    try:
        return open_folder(Path(snapshot_download(repo_id, allow_patterns=NEEDED_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        if incomplete is not None:
            raise incomplete from error
        raise CheckpointError(
            f"{repo_id} is not in the Hugging Face cache and cannot be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the name and the "
            "network, or give --checkpoint a folder."
        ) from error
