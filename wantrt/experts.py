"""A hybrid schedule as it is asked for: experts of several checkpoints, each for its sigmas.

    14B@/models/wan-14b:1.0-0.9,1.3B@random:0:dim=256,num_heads=2:0.9-0

An expert is written NAME@CHECKPOINT:FROM-TO. NAME is a variant or an alias; `custom` is whatever
the checkpoint is; of several experts one is named behind a dot: t2v-a14b.high_noise. CHECKPOINT is
all that `--checkpoint` takes, commas and colons included: an expert ends at the first `:FROM-TO`
that a comma or the end follows. Imports nothing heavy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from wantrt.config import VARIANTS, find_variant
from wantrt.errors import SettingsError

NUMBER = r"\d*\.?\d+(?:e-?\d+)?"
EXPERT = re.compile(rf"\s*([\w.-]+)@(.+?):({NUMBER})-({NUMBER})\s*(?:,|$)")
CUSTOM = "custom"


@dataclass(frozen=True)
class ExpertRange:
    """One expert of a hybrid: NAME@CHECKPOINT, from the sigma `start` down to `end`."""

    name: str
    checkpoint: str
    start: float
    end: float

    def __str__(self) -> str:
        return f"{self.name}@{self.checkpoint}:{self.start:.12g}-{self.end:.12g}"

    def split_name(self) -> tuple[str | None, str | None]:
        """The variant (None: custom), and which of its experts if NAME says so.

        Raises SettingsError with the nearest known name.
        """
        variant, expert = self.name, None
        head, _, tail = variant.rpartition(".")
        if not _is_known(variant) and _is_known(head):
            variant, expert = head, tail
        return None if variant.lower() == CUSTOM else find_variant(variant).name, expert


def _is_known(name: str) -> bool:
    known = {alias for row in VARIANTS.values() for alias in (row.name, *row.aliases)}
    return name.lower() in {*known, CUSTOM}


def parse_experts(text: str) -> tuple[ExpertRange, ...]:
    """The experts of a list, checked. Raises SettingsError."""
    experts, place = [], 0
    while place < len(text):
        match = EXPERT.match(text, place)
        if match is None:
            raise SettingsError(
                f"cannot read {text[place:]!r} as experts. Write NAME@CHECKPOINT:FROM-TO, as in "
                "14B@FOLDER:1.0-0.9,1.3B@FOLDER:0.9-0"
            )
        experts.append(ExpertRange(match[1], match[2], float(match[3]), float(match[4])))
        place = match.end()
    check_experts(experts)
    return tuple(experts)


def is_list_of_experts(text: str) -> bool:
    """Whether it begins like one; it may still be refused."""
    return EXPERT.match(text) is not None


def check_experts(experts: Sequence[ExpertRange]) -> None:
    """Raises SettingsError unless names are known, and the ranges go from 1 to 0 in one line."""
    if not experts:
        raise SettingsError("the list of experts is empty; write NAME@CHECKPOINT:FROM-TO")
    for one in experts:
        one.split_name()
        if not 1 >= one.start > one.end >= 0:
            raise SettingsError(
                f"{one} has the range {one.start:g}-{one.end:g}; sigmas fall, from 1 to 0"
            )
    for before, after in pairwise(experts):
        if before.end != after.start:
            kind = "a gap" if before.end > after.start else "an overlap"
            raise SettingsError(
                f"there is {kind} between the experts {before.name}, down to {before.end:g}, and "
                f"{after.name}, from {after.start:g}; each goes on where the one before ends"
            )
    if (experts[0].start, experts[-1].end) != (1, 0):
        raise SettingsError(
            f"the experts serve sigmas from {experts[0].start:g} to {experts[-1].end:g}; "
            "the first begins at 1 and the last ends at 0"
        )


def write_experts(experts: Sequence[ExpertRange]) -> str:
    """As `parse_experts` reads it. Raises SettingsError."""
    check_experts(experts)
    for one in experts:
        match = EXPERT.match(str(one))
        if match is None or match[2] != one.checkpoint:
            raise SettingsError(f"{str(one)!r} can be read in two ways; rename the folder")
    return ",".join(map(str, experts))
