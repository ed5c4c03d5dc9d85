"""``wantrt build``: a bundle from a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from wantrt.cli.command import command
from wantrt.cli.console import Console, gib
from wantrt.errors import SettingsError
from wantrt.jobs import parse_size

if TYPE_CHECKING:
    from wantrt.build import Build
    from wantrt.bundle import Bundle
    from wantrt.pieces import BuildLog

Item = TypeVar("Item")
INTERRUPTED = 130  # exit code


def list_of(
    parse: Callable[[str], Item],
) -> Callable[[click.Context, click.Parameter, str | None], tuple[Item, ...] | None]:
    """Callback of an option that takes a comma-separated list."""

    def read(
        ctx: click.Context, param: click.Parameter, value: str | None
    ) -> tuple[Item, ...] | None:
        if value is None:
            return None
        try:
            items = tuple(parse(text.strip()) for text in value.split(",") if text.strip())
        except (SettingsError, ValueError) as error:
            raise click.BadParameter(str(error), ctx, param) from None
        if not items:
            raise click.BadParameter("the list is empty", ctx, param)
        return items

    return read


def parse_count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise SettingsError(f"{text!r} is not a number of frames; write one as in 81")
    return int(text)


@command()
@click.option("--variant", metavar="NAME", help="Which model, as `wantrt info` lists them.")
@click.option(
    "--checkpoint",
    metavar="SOURCE",
    help="A folder (official or Diffusers layout), a Hugging Face repository, or random:SEED. "
    "[default: the variant's repository]",
)
@click.option(
    "--experts",
    metavar="NAME@CHECKPOINT:FROM-TO,…",
    help="A hybrid schedule instead of one checkpoint: variants with their checkpoints, and the "
    "sigmas that each serves, from 1 down to 0, as in 14B@FOLDER:1.0-0.9,1.3B@FOLDER:0.9-0. Of "
    "several experts, one: t2v-a14b.high_noise@FOLDER:1.0-0.9. Text encoder, VAE and defaults are "
    "the first one's.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the bundle. [default: VARIANT-PRECISION here]",
)
@click.option("--runtime", default="auto", show_default=True, help="What shall run it.")
@click.option("--precision", metavar="NAME", help="fp32, bf16 or fp16. [default: the runtime's]")
@click.option(
    "--stack", type=int, metavar="N", help="Transformer blocks a run. [default: up to 10]"
)
@click.option("--no-weights", is_flag=True, help="Graphs and plans only.")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    metavar="N",
    help="Plans compiled at once. [default: one a core, as far as memory allows; on a GPU 1]",
)
@click.option("--check", is_flag=True, help="Hash what is there; rebuild what is damaged.")
@click.option("--dry-run", is_flag=True, help="Say what would be built, and write nothing.")
@click.option(
    "--size",
    "sizes",
    metavar="WxH,…",
    callback=list_of(parse_size),
    help="Plans: sizes to serve, besides those the bundle serves already. [default: the variant's]",
)
@click.option(
    "--frames",
    metavar="N,…",
    callback=list_of(parse_count),
    help="Plans: numbers of frames to serve at each size. [default: the variant's]",
)
@click.option(
    "--target",
    "targets",
    metavar="sm89,…",
    callback=list_of(str),
    help="Plans of tensorrt-rtx: GPUs to compile for. [default: this machine's, or all common]",
)
@click.option(
    "--weights",
    default="auto",
    show_default=True,
    metavar="WAY",
    help="Plans: bound (apart from the plans; the VAE's are always inside), baked (all inside), "
    "auto (what is faster here; bound without a GPU).",
)
@click.option(
    "--plugins",
    default="auto",
    show_default=True,
    metavar="WAY",
    help="Plans of tensorrt: our kernels inside them, on or off, or auto (what is faster here).",
)
@click.option("--dynamic", is_flag=True, help="Plans: one for all sizes, not one for each.")
@click.option("--tf32", is_flag=True, help="Plans: allow TF32 for what is float32.")
def build(
    console: Console, jobs: int | None, check: bool, dry_run: bool, no_weights: bool, **asked: Any
) -> int | None:
    """Prepare weights, export graphs and compile TensorRT plans into a bundle.

    A second build makes nothing; an interrupted one goes on where it stopped.
    """
    if asked["variant"] is asked["checkpoint"] is asked["experts"] is None:
        raise click.UsageError("name a model with --variant or --checkpoint, or both, or --experts")
    asked["with_weights"] = not no_weights

    from wantrt.bundle import Bundle
    from wantrt.pieces import read_log
    from wantrt.receipt import find_done, write_receipt

    receipt = write_receipt(asked)
    if not check and not dry_run and (done := find_done(asked["out"], receipt)):
        show_result(console, Bundle.load(done, checked=False), [], 0)
        return None

    from wantrt.build import plan_build

    plan = plan_build(**asked)
    if dry_run:
        show_plan(console, plan)
        return None
    before = read_log(plan.out)
    try:
        with console.progress() as progress:
            bundle = plan.run(check=check, jobs=jobs, progress=progress, receipt=receipt)
    except KeyboardInterrupt:
        console.say("wantrt: stopped; the same command goes on where it stopped")
        return INTERRUPTED
    show_result(console, bundle, newly_built(before, read_log(plan.out)), len(plan.pieces))
    return None


def newly_built(before: "BuildLog | None", after: "BuildLog | None") -> list[str]:
    """The pieces that a build has made."""
    earlier = before.pieces if before else {}
    made = after.pieces if after else {}
    return sorted(name for name, built in made.items() if built != earlier.get(name))


def show_result(console: Console, bundle: "Bundle", built: list[str], pieces: int) -> None:
    total = sum(record.size for record in bundle.manifest.files.values())
    made = f"{len(built)} of {pieces} pieces built" if built else "nothing to do"
    plans = plan_bytes(bundle)
    console.print(
        f"{bundle.variant.title}, {', '.join(sorted(set(bundle.precision.values())))}, "
        f"{gib(total)}: {made}, {console.seconds:.1f} s"
    )
    if plans:
        console.print(
            f"{plans['count']} plans: DiT and text {plans['dit_and_text_bytes'] / 1e6:.1f} MB, "
            f"VAE {plans['vae_bytes'] / 1e6:.1f} MB"
        )
    console.path(bundle.path)
    console.result(
        {
            "bundle": str(bundle.path),
            "fingerprint": bundle.fingerprint,
            "variant": bundle.variant.name,
            "precision": bundle.precision,
            "bytes": total,
            "plans": plans,
            "built": built,
            "seconds": round(console.seconds, 3),
        }
    )


def plan_bytes(bundle: "Bundle") -> dict[str, int]:
    """How many plans, and their bytes; empty where there are none."""
    sizes = {"vae_bytes": 0, "dit_and_text_bytes": 0}
    count = 0
    for component in bundle.manifest.components:
        kind = "vae_bytes" if component.name.startswith("vae_") else "dit_and_text_bytes"
        count += len(component.plans)
        sizes[kind] += sum(bundle.manifest.files[plan.file].size for plan in component.plans)
    return {"count": count, **sizes} if count else {}


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
