"""Six videos side by side, as the README shows them: ``python -m wantrt.nano.examples OUT.gif``."""

import sys

import numpy as np

from wantrt.media import Video
from wantrt.runtime.pipeline import Pipeline

PROMPTS = (
    "a red circle moves right",
    "a blue star grows on white",
    "a green square bounces on black",
    "a yellow triangle grows on black",
    "a purple star moves down",
    "an orange circle shrinks on gray",
)
SEED = 1
ZOOM = 2


def main(out: str) -> None:
    with Pipeline.load() as pipe:
        clips = [pipe(prompt, seed=SEED).frames for prompt in PROMPTS]
        fps = pipe.variant.fps
    rows = [np.concatenate(clips[i : i + 3], axis=2) for i in (0, 3)]  # [F, H, 3W, 3]
    frames = np.concatenate(rows, axis=1).repeat(ZOOM, axis=1).repeat(ZOOM, axis=2)
    metadata = {"prompts": PROMPTS, "seed": SEED, "variant": "nano"}
    print(Video(frames, fps=fps, metadata=metadata).save(out, overwrite=True))


if __name__ == "__main__":
    main(sys.argv[1])
