"""The bundle that is measured: one that is there, or one built into the user's cache folder.

Generated weights that a GPU runs with are drawn on the GPU: to write and to read tens of gigabytes
of numbers that mean nothing would take longer than the measurement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrt.build import choose_precision, open_bundle, open_shipped, plan_build
from wantrt.bundle import Bundle
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.checkpoint import meta_module, part_configs
from wantrt.checkpoints.generate import scale_of
from wantrt.config import SHIPPED, Size, Variant, find_variant
from wantrt.errors import SettingsError
from wantrt.folder import Progress, cache_folder
from wantrt.linked import refuse_other_names
from wantrt.runtime.loading import RUNTIMES, choose_for, choose_runtime
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)


@dataclass(frozen=True)
class DrawnBundle(Bundle):
    """A bundle without weights, whose tensors are drawn on `device` when a part is loaded.

    They have the distribution of a `random:` checkpoint, and are other numbers.
    """

    device: torch.device

    def weights(self, part: str) -> dict[str, Tensor]:
        """Prepared tensors by name, on the device; the same numbers every time."""
        config, dtype = part_configs(self.variant)[part], PRECISIONS[self.precision[part]]
        generator = torch.Generator(self.device).manual_seed(0)
        return {
            name: torch.empty(tuple(p.shape), dtype=p.dtype, device=self.device).normal_(
                *scale_of(name, tuple(p.shape)), generator=generator
            )
            for name, p in meta_module(config, dtype).named_parameters()
        }


@dataclass(frozen=True)
class Choice:
    """A bundle that was asked for: what it is of, and how it is opened, or built first."""

    variant: Variant
    open: Callable[[Progress], Bundle]


def choose_bundle(
    bundle: Path | None,
    variant: str | None,
    checkpoint: str | None,
    precision: str | None,
    *,
    runtimes: Sequence[str],
    draw: bool = False,
    sizes: Sequence[Size] | None = None,
    frames: Sequence[int] | None = None,
) -> Choice:
    """What is to be measured, of the options --bundle, --variant, --checkpoint and --precision.

    runtimes: that shall run it; it is built for the first. draw: generated weights need not be
    written. sizes, frames: for plans; None is the variant's first. What is wrong is found here, and
    nothing is built yet.
    Raises SettingsError, BundleError, CheckpointError, RuntimeUnavailableError.
    """
    if bundle is not None:
        given = {"--variant": variant, "--checkpoint": checkpoint, "--precision": precision}
        if extra := [name for name, value in given.items() if value is not None]:
            raise SettingsError(f"--bundle is built already; leave out {' and '.join(extra)}")
    for runtime in runtimes if precision else ():
        if runtime in RUNTIMES:  # its refusal names what it takes; that of choose_runtime, a build
            choose_precision(runtime, precision)
    chosen = [choose_runtime(runtime, (precision,) if precision else ()) for runtime in runtimes]
    first, asked = chosen[0], str(bundle or variant or "nano")
    if asked in SHIPPED and not (bundle or checkpoint or precision or first.compiled):
        return Choice(find_variant(asked), lambda progress: open_shipped(asked, progress))
    if bundle is not None:
        loaded = open_bundle(bundle)
        for runtime in runtimes:
            choose_for(loaded, runtime)
        return Choice(loaded.variant, lambda progress: loaded)
    opened = open_checkpoint(checkpoint, variant)
    precision = choose_precision(first.name, precision)
    drawn = draw and opened.layout is None and all(runtime.on_gpu() for runtime in chosen)
    kind = f"{precision}{'-no-weights' if drawn else ''}"
    plan = plan_build(
        checkpoint,
        variant,
        out=cache_folder() / "bundles" / f"{opened.variant.name}-{kind}-{opened.fingerprint[:16]}",
        runtime=first.name,
        precision=precision,
        with_weights=not drawn,
        sizes=(sizes or [opened.variant.size]) if first.compiled else None,
        frames=(frames or [opened.variant.num_frames]) if first.compiled else None,
    )

    def build(progress: Progress) -> Bundle:
        built = plan.run(wait=True, progress=progress)
        if not drawn:
            return built
        return DrawnBundle(built.path, built.manifest, built.fingerprint, torch.device("cuda"))

    return Choice(opened.variant, build)


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """What of it decides a measurement, for the settings of a result."""
    return {
        "variant": bundle.variant.name,
        "checkpoint": bundle.manifest.checkpoint.fingerprint[:16],
        "precision": bundle.precision,
        "weights": "drawn on the device" if isinstance(bundle, DrawnBundle) else "of the bundle",
    }
