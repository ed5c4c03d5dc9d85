"""Which plans a component needs: one for each requested size, static unless a range is asked for.

A component whose shapes do not depend on the size of the video (text, time, condition) has one plan
with a small range.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from wantrt.linked import refuse_other_names
from wantrt.models.components import Component
from wantrt.session import Range

refuse_other_names(__spec__)


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """All that decides the bytes of a plan, besides TensorRT itself.

    symbols: the sizes it shall serve; equal ends are static. targets: "sm89", …; for the flavour
    that builds on its own GPU, the name of that GPU. baked: weights that become constants, by their
    names in the graph; empty: they are inputs.
    """

    component: Component
    graph: Path
    symbols: Mapping[str, Range]
    targets: tuple[str, ...]
    baked: Mapping[str, Tensor] = field(default_factory=dict)
    tf32: bool = False
