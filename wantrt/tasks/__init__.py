"""What each task does before the denoising loop: image, frames, masks, audio -> conditioning.

Text to video needs nothing but the prompt. Another task gets a file here and an entry in `TASKS`.
"""

from wantrt.config import VARIANTS, Variant
from wantrt.errors import UnsupportedTaskError

TASKS = ("t2v",)  # the tasks that work today


def require_task(variant: Variant) -> None:
    """Raise UnsupportedTaskError, in one line, for a task that is not there yet."""
    if variant.task not in TASKS:
        ready = ", ".join(v.name for v in VARIANTS.values() if v.task in TASKS)
        raise UnsupportedTaskError(
            f"{variant.name}: task {variant.task} is not there yet; today: {ready}"
        )
