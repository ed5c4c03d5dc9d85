"""``wantrt generate``: videos from prompts."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wantrt.cli.command import command, describe, size_option
from wantrt.cli.console import Console

if TYPE_CHECKING:
    from wantrt.batch import Failed, Made
    from wantrt.errors import WantrtError
    from wantrt.jobs import Job


def one_of(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> str | None:
    """Callback of an option that takes one value, and of which a second would be lost silently."""
    if len(values) > 1:
        raise click.BadParameter(f"it is given {len(values)} times; give one", ctx, param)
    return values[0] if values else None


@command()
@click.argument("prompt", required=False)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="A folder, or what ships. [default: nano; nano-i2v with --image]",
)
@click.option(
    "--runtime",
    default="auto",
    show_default=True,
    help="tensorrt, tensorrt-rtx, onnxruntime or torch.",
)
@click.option("--negative-prompt", metavar="TEXT", help="What guidance leads away from.")
@click.option(
    "--image",
    metavar="FILE",
    multiple=True,
    callback=one_of,
    help="The first frame (I2V, FLF2V, TI2V).",
)
@click.option(
    "--last-image", metavar="FILE", multiple=True, callback=one_of, help="The last frame (FLF2V)."
)
@click.option(
    "--video",
    metavar="PATH",
    multiple=True,
    callback=one_of,
    help="What steers: a file or a folder of frames (VACE).",
)
@click.option(
    "--mask",
    metavar="PATH",
    multiple=True,
    callback=one_of,
    help="White: made anew. A video, a folder or one image (VACE).",
)
@click.option(
    "--reference-image",
    "reference_images",
    metavar="FILE",
    multiple=True,
    help="What shall appear; may be repeated (VACE).",
)
@click.option("--context-scale", type=float, metavar="X", help="How strongly VACE steers.")
@click.option(
    "--fit",
    metavar="WAY",
    help="How an image or a video is brought to the size: crop, pad or stretch; area: the size "
    "follows it. [default: area; crop with --size]",
)
@click.option(
    "--size",
    metavar="WxH",
    callback=size_option,
    help="Pixels. [default: the model's, or the first that the bundle's plans serve]",
)
@click.option("--frames", "num_frames", type=int, metavar="N", help="4n + 1 of them.")
@click.option("--steps", "num_inference_steps", type=int, metavar="N", help="Denoising steps.")
@click.option("--guidance-scale", type=float, metavar="X", help="1 is no guidance.")
@click.option("--guidance-scale-2", type=float, metavar="X", help="Of the experts after the first.")
@click.option("--flow-shift", type=float, metavar="X", help="More: more steps at high noise.")
@click.option("--solver", metavar="NAME", help="unipc, dpm++ or euler.")
@click.option(
    "--convention", default="official", show_default=True, metavar="NAME", help="Or diffusers."
)
@click.option("--seed", type=int, metavar="N", help="[default: drawn, and told]")
@click.option("--noise", default="cpu", show_default=True, help="Whose generator: cpu or cuda.")
@click.option(
    "--residency",
    default="resident",
    show_default=True,
    metavar="NAME",
    help="What stays in a GPU's memory: resident (all), phase (a part at a time; a "
    "second expert takes the first one's place as that finishes) or stream (phase, and stacks come "
    "from host memory).",
)
@click.option(
    "--text-encoder", "text_encoder_on", metavar="DEVICE", help="cpu: the text encoder runs there."
)
@click.option("--trust-plans", is_flag=True, help="Run plans that another machine compiled.")
@click.option("--init-latents", type=click.Path(path_type=Path), help="Start from these.")
@click.option("--latents", type=click.Path(path_type=Path), help="Save the final latents here.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Many videos: a prompt a line, or JSON lines (prompt, seed, out, …).",
)
@click.option(
    "--out",
    metavar="PATH",
    help="x.mp4, x.gif, x.png, or a folder of pngs (x/). With --prompts: the folder of the videos. "
    "[default: named after prompt and seed]",
)
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
def generate(
    console: Console,
    prompt: str | None,
    bundle: Path | None,
    runtime: str,
    prompts: Path | None,
    out: str | None,
    latents: Path | None,
    init_latents: Path | None,
    overwrite: bool,
    residency: str,
    text_encoder_on: str | None,
    trust_plans: bool,
    **settings: Any,
) -> int:
    """Make a video from PROMPT, or one from every line of --prompts.

    What is not given is the bundle's default. The same seed on the same machine and runtime gives
    the same video.
    """
    if (prompt is None) == (prompts is None):
        raise click.UsageError('give a prompt, as in wantrt generate "a cat surfing", or --prompts')
    if prompts is not None and (latents or init_latents):
        raise click.UsageError("--latents and --init-latents of many videos go into their lines")

    from wantrt.batch import Failed, generate_all
    from wantrt.build import open_bundle, open_shipped
    from wantrt.jobs import Job, read_prompts

    given = {name: value for name, value in settings.items() if value not in (None, ())}
    jobs: list[Job | WantrtError] = [Job(prompt or "", given, out, latents, init_latents)]
    if prompts is not None:
        jobs = [with_defaults(job, given) for job in read_prompts(prompts)]
    results: list[Made | Failed] = []
    with console.progress() as progress:
        if bundle is None:
            loaded = open_shipped(default_bundle(jobs), progress)
        else:
            loaded = open_bundle(bundle, progress)
        folder = Path(out or ".") if prompts else Path()
        for result in generate_all(
            loaded,
            jobs,
            runtime=runtime,
            residency=residency,
            text_encoder_on=text_encoder_on,
            trust_plans=trust_plans,
            folder=folder,
            overwrite=overwrite,
            progress=progress,
        ):
            if isinstance(result, Failed) and prompt is not None:
                raise result.error
            results.append(result)
            show(console, result)
    failed = sum(isinstance(result, Failed) for result in results)
    if len(results) > 1:
        console.print(f"{len(results) - failed} made, {failed} failed, {console.seconds:.1f} s")
    console.result(
        {
            "bundle": str(loaded.path),
            "results": [plain(result) for result in results],
            "seconds": round(console.seconds, 3),
        }
    )
    return 1 if failed else 0


def default_bundle(jobs: "Sequence[Job | WantrtError]") -> str:
    """What ships and takes what the jobs start from."""
    from_image = [not isinstance(job, Exception) and "image" in job.settings for job in jobs]
    return "nano-i2v" if any(from_image) else "nano"


def with_defaults(job: "Job | WantrtError", given: dict[str, Any]) -> "Job | WantrtError":
    """What a line says wins over the options."""
    from dataclasses import replace

    return job if isinstance(job, Exception) else replace(job, settings={**given, **job.settings})


def show(console: Console, result: "Made | Failed") -> None:
    from wantrt.batch import Failed

    if isinstance(result, Failed):
        console.say(f"wantrt: error: {result.prompt or ''}: {describe(result.error)}")
        return
    settings, phases = result.settings, result.timings
    width, height = settings.size
    frames = "1 frame" if settings.num_frames == 1 else f"{settings.num_frames} frames"
    console.print(
        f"{settings.prompt!r}: {width}x{height}, {frames}, "
        f"{settings.num_inference_steps} steps, seed {settings.seed}",
        ", ".join(f"{name.removesuffix('_s')} {s:.1f} s" for name, s in phases.items())
        + f"; {result.seconds:.1f} s to the file",
    )
    console.path(result.out)


def plain(result: "Made | Failed") -> dict[str, Any]:
    from wantrt.batch import Failed

    if isinstance(result, Failed):
        error = {"type": type(result.error).__name__, "message": str(result.error)}
        return {"prompt": result.prompt, "error": error}
    return {
        "out": str(result.out),
        "latents": str(result.latents) if result.latents else None,
        "settings": result.settings.as_dict(),
        "timings": result.timings,
        "seconds": round(result.seconds, 3),
    }
