"""``wantrt verify``: a bundle compared with its checkpoint."""

from dataclasses import asdict
from pathlib import Path

import click

from wantrt.cli.command import command
from wantrt.cli.console import Console

NAMED = 20  # weights of one kind that are listed


@command()
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="A folder, nano or nano-i2v, which ship. [default: nano]",
)
@click.option(
    "--checkpoint", metavar="SOURCE", help="[default: what the bundle was built from here]"
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="tensorrt, tensorrt-rtx, onnxruntime or torch.",
)
@click.option(
    "--steps",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Also compare the latents of N denoising steps.",
)
@click.option("--trust-plans", is_flag=True, help="Run plans that another machine compiled.")
def verify(
    console: Console,
    bundle: Path | None,
    checkpoint: str | None,
    runtime: str,
    steps: int,
    trust_plans: bool,
) -> int:
    """Compare every component of a bundle with the checkpoint's float32 reference.

    Also hashes every file, and names weights that hold NaN or are not the checkpoint's.
    """
    from wantrt.build import open_bundle
    from wantrt.cli.info import table
    from wantrt.verify import verify as verify_bundle

    with console.progress() as progress:
        loaded = open_bundle(bundle, progress)
        report = verify_bundle(
            loaded,
            checkpoint,
            runtime=runtime,
            steps=steps,
            trust_plans=trust_plans,
            progress=progress,
        )
    rows = table("part", "component", "precision", "relative error", "at most", "cosine", "")
    for found in (*report.components, *report.trajectory):
        rows.add_row(
            found.part,
            found.name,
            found.precision,
            f"{found.relative_error:.1e}",
            f"{found.tolerance.relative_error:.0e}",
            f"{found.cosine:.7f}",
            "✓" if found.ok else "✗",
        )
    console.print(rows, "")
    for kind, names in (
        ("NaN or infinity", report.nonfinite),
        ("not as in the checkpoint", report.different),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            console.print(f"✗ {kind}: {', '.join(names[:NAMED])}{more}")
    verdict = "is what its checkpoint says" if report.ok else "differs from its checkpoint"
    console.print(f"{loaded.path} on {report.runtime} {verdict}, {console.seconds:.1f} s")
    console.result(
        {
            "bundle": str(loaded.path),
            **asdict(report),
            "ok": report.ok,
            "seconds": round(console.seconds, 3),
        }
    )
    return 0 if report.ok else 1
