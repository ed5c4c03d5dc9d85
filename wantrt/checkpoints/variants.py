"""Which variant a checkpoint is: the row of the table with its task and dimensions, or `custom`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace

from wantrt.checkpoints.configs import differences
from wantrt.config import (
    VARIANTS,
    DiTConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
    Variant,
)
from wantrt.errors import CheckpointError


def with_dimensions(
    row: Variant,
    dits: Sequence[DiTConfig],
    vae: VAEConfig,
    text_encoder: TextEncoderConfig,
    image_encoder: ImageEncoderConfig | None = None,
) -> Variant:
    """`row` if these are its dimensions, else `custom` with the row's settings."""
    experts = tuple(replace(expert, dit=dit) for expert, dit in zip(row.experts, dits, strict=True))
    found = replace(
        row, experts=experts, vae=vae, text_encoder=text_encoder, image_encoder=image_encoder
    )
    if found == row:
        return row
    return replace(
        found,
        name="custom",
        title=f"custom {row.task}, settings of {row.name}",
        aliases=(),
        repo_id=None,
        diffusers_repo_id=None,
    )


def identify(
    task: str,
    dits: Sequence[DiTConfig],
    vae: VAEConfig,
    text_encoder: TextEncoderConfig,
    image_encoder: ImageEncoderConfig | None = None,
    *,
    requested: Variant | None = None,
    source: str = "the checkpoint",
) -> tuple[Variant, str | None]:
    """The variant of a checkpoint and, where several are possible, a note that says so.

    Of the rows that fit, the one whose repository is `source` wins, else the first. Raises
    CheckpointError if `requested` does not fit.
    """
    rows = [r for r in VARIANTS.values() if r.task == task and len(r.experts) == len(dits)]
    encoders = vae, text_encoder, image_encoder
    if requested is not None:
        found = with_dimensions(requested, dits, *encoders) if requested in rows else None
        if found != requested:
            raise _disagreement(requested, found, task, len(dits), source)
        return requested, None
    if not rows:
        raise CheckpointError(f"{source} has {len(dits)} experts; no {task} variant has so many.")
    for row in rows:
        if source in (row.repo_id, row.diffusers_repo_id):
            return with_dimensions(row, dits, *encoders), None
    fitting = [row for row in rows if with_dimensions(row, dits, *encoders) == row]
    if not fitting:
        nearest = min(rows, key=lambda row: _distance(row, dits, image_encoder))
        return with_dimensions(nearest, dits, *encoders), None
    chosen = fitting[0]
    twins = [
        row.name  # an A14B expert alone looks like the 14B model
        for row in VARIANTS.values()
        if row != chosen
        and row.task == task
        and dits[0] in [e.dit for e in row.experts]
        and len(row.experts) >= len(dits)
    ]
    if not twins:
        return chosen, None
    return (
        chosen,
        f"{source} fits {chosen.name} and {', '.join(twins)} alike: taken as {chosen.name}",
    )


def _disagreement(
    requested: Variant, found: Variant | None, task: str, num_experts: int, where: str
) -> CheckpointError:
    if found is None:
        what = (
            f"a {task} model of {num_experts} expert(s), {requested.name} is {requested.task} "
            f"of {len(requested.experts)}"
        )
    else:
        pairs = [
            ("transformer", requested.experts[0].dit, found.experts[0].dit),
            ("VAE", requested.vae, found.vae),
            ("text encoder", requested.text_encoder, found.text_encoder),
            ("image encoder", requested.image_encoder, found.image_encoder),
        ]
        what = "of other dimensions: " + "; ".join(
            f"{part} {', '.join(differences(expected, actual))}"
            for part, expected, actual in pairs
            if expected != actual
        )
    return CheckpointError(
        f"{where} is not {requested.name}: it is {what}. Leave --variant out to take it as it is."
    )


def _distance(
    row: Variant, dits: Sequence[DiTConfig], image_encoder: ImageEncoderConfig | None
) -> float:
    """How far the dimensions are from a row's: the sum of the logarithms of their ratios."""
    total = math.inf if image_encoder and not row.image_encoder else 0.0
    for expert, dit in zip(row.experts, dits, strict=True):
        ours = asdict(expert.dit)
        for name in ("dim", "ffn_dim", "num_layers", "text_dim"):
            total += abs(math.log(ours[name] / getattr(dit, name)))
    return total
