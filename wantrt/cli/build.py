"""``wantrt build``: a bundle from a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from wantrt.cli.command import command
from wantrt.cli.console import Console, gib
from wantrt.errors import UnsupportedTaskError

if TYPE_CHECKING:
    from wantrt.build import Build


@command()
@click.option("--variant", metavar="NAME", help="Which model, as `wantrt info` lists them.")
@click.option(
    "--checkpoint",
    metavar="SOURCE",
    help="A folder (official or Diffusers layout), a Hugging Face repository, or random:SEED. "
    "[default: the variant's repository]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the bundle. [default: VARIANT-PRECISION here]",
)
@click.option("--runtime", default="auto", show_default=True, help="What shall run it.")
@click.option("--precision", metavar="NAME", help="fp32 or bf16. [default: the runtime's]")
@click.option(
    "--stack", type=int, metavar="N", help="Transformer blocks a run. [default: up to 10]"
)
@click.option("--no-weights", is_flag=True, help="Graphs only.")
@click.option("--check", is_flag=True, help="Hash what is there; rebuild what is damaged.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and write nothing.")
@click.option("--size", metavar="WxH,…", help="For TensorRT plans. (Not there yet.)")
@click.option("--target", metavar="sm89,…", help="For TensorRT plans. (Not there yet.)")
@click.option("--weights", metavar="bound|baked", help="For TensorRT plans. (Not there yet.)")
def build(
    console: Console,
    variant: str | None,
    checkpoint: str | None,
    out: Path | None,
    runtime: str,
    precision: str | None,
    stack: int | None,
    no_weights: bool,
    check: bool,
    dry_run: bool,
    size: str | None,
    target: str | None,
    weights: str | None,
) -> None:
    """Prepare weights and export graphs into a bundle.

    A second build makes nothing; an interrupted one goes on where it stopped.
    """
    for option, value in (("size", size), ("target", target), ("weights", weights)):
        if value is not None:
            raise UnsupportedTaskError(f"--{option} is for TensorRT plans: not there yet")
    if variant is None and checkpoint is None:
        raise click.UsageError("name a model with --variant or --checkpoint, or both")

    from wantrt.build import plan_build

    plan = plan_build(
        checkpoint,
        variant,
        out,
        runtime=runtime,
        precision=precision,
        stack=stack,
        with_weights=not no_weights,
    )
    if dry_run:
        show_plan(console, plan)
        return
    missing = {piece.name for piece in plan.missing()}
    with console.progress() as progress:
        bundle = plan.run(check=check, progress=progress)
    total = sum(record.size for record in bundle.manifest.files.values())
    made = f"{len(missing)} of {len(plan.pieces)} pieces built" if missing else "nothing to do"
    console.print(
        f"{bundle.variant.title}, {', '.join(sorted(set(bundle.precision.values())))}, "
        f"{gib(total)}: {made}, {console.seconds:.1f} s"
    )
    console.path(bundle.path)
    console.result(
        {
            "bundle": str(bundle.path),
            "fingerprint": bundle.fingerprint,
            "variant": bundle.variant.name,
            "precision": bundle.precision,
            "bytes": total,
            "built": sorted(missing),
            "seconds": round(console.seconds, 3),
        }
    )


def show_plan(console: Console, plan: "Build") -> None:
    from wantrt.cli.info import table

    missing = {piece.name for piece in plan.missing()}
    rows = table("piece", "about", "")
    for piece in plan.pieces:
        rows.add_row(
            piece.name, gib(piece.size), "to build" if piece.name in missing else "✓ there"
        )
    total = sum(piece.size for piece in plan.pieces if piece.name in missing)
    variant = plan.checkpoint.variant
    console.print(f"{variant.title} from {plan.checkpoint.source} into {plan.out}\n", rows)
    console.print(f"\nto build: {len(missing)} of {len(plan.pieces)} pieces, {gib(total)}")
    console.result(
        {
            "bundle": str(plan.out),
            "variant": variant.name,
            "source": plan.checkpoint.source,
            "pieces": [
                {"name": p.name, "bytes": p.size, "there": p.name not in missing}
                for p in plan.pieces
            ],
            "bytes_to_build": total,
        }
    )
