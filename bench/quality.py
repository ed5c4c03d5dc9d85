"""One bundle's videos beside another's from the same latents: what a precision or a shortcut costs.

    wantrt bench quality --bundle nano-bf16 --runtime torch --against nano --against-runtime torch

For every prompt and seed both make a video from the same noise. PSNR and SSIM are of the frames,
`latents_difference` of the last latents (root of the mean square, over the reference's). Beside
them stands the noise floor: the reference bundle once more, on torch with another of its exact
attentions. What lies there cannot be told from an exact engine; where no other attention serves,
the bits are the same, and the row says so in the place of a PSNR. Both bundles are of one
checkpoint. They are loaded one after another: first the reference makes all its videos, which wait
in the host's memory.

For nano, the judge (wantrt/nano/judge.py) also says of how many videos colour, shape and motion are
those of the prompt. LPIPS is not measured: see bench/similarity.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wantrt.bench.bundles import describe_bundle
from wantrt.bench.options import FRAMES, RESIDENCY, RESULT, SIZE, STEPS, options
from wantrt.bench.result import Row, Table, number, run, spread, start
from wantrt.bench.similarity import Frames, psnr, ssim
from wantrt.build import open_bundle
from wantrt.bundle import Bundle
from wantrt.cli.build import list_of
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.errors import BenchError, SettingsError
from wantrt.jobs import Job, read_prompts
from wantrt.linked import refuse_other_names
from wantrt.nano.evaluate import ASPECTS
from wantrt.nano.judge import judge
from wantrt.nano.scenes import load_held_out
from wantrt.runtime.loading import choose_for
from wantrt.runtime.pipeline import Pipeline, Progress
from wantrt.runtime.settings import Settings
from wantrt.runtime.sizes import resolve_for
from wantrt.schedulers.noise import draw_noise

refuse_other_names(__spec__)

PROMPTS = (
    "a cat walking through wet grass at sunrise, close-up",
    "waves breaking on black rocks, seen from above",
    "a red train crossing a stone bridge in the snow",
    "an old man playing the cello in an empty hall",
)
ASKED = ("size", "num_frames", "num_inference_steps", "guidance_scales", "solver", "flow_shift")
NO_NOISE = "the same bits: no other attention served it"
SMALLEST = 11  # the side of the window of SSIM


def latents_cell(row: Row) -> str:
    value = row["latents_difference"]
    return f"{value['median'] if isinstance(value, Mapping) else value:.1g}"


def name_cell(row: Row) -> str:
    return row["name"] + (f": {row['says']}" if "says" in row else "")


TABLE = Table(
    (
        ("video", name_cell),
        ("PSNR dB", number("psnr_db", 1)),
        ("p10", number("psnr_db", 1, part="p10")),
        ("SSIM", number("ssim", 4)),
        ("p10", number("ssim", 4, part="p10")),
        ("latents", latents_cell),
        ("e2e s", number("e2e_s")),
        ("speedup", number("speedup")),
        ("right", number("right", 0, "%", 100)),
    )
)


@dataclass(frozen=True)
class Made:
    """A video: frames, the last latents [1, C, F, H, W], and seconds from prompt to frames."""

    frames: Frames
    latents: Tensor
    seconds: float


def make_videos(
    bundle: Bundle,
    runtime: str,
    requests: Sequence[Settings],
    residency: str,
    attention: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Iterator[Made]:
    """A video for each of the requests, after a warm-up. The bundle is loaded for as long."""
    with Pipeline.load(bundle, runtime, residency=residency) as pipe:
        for index, settings in enumerate(requests):
            noise = draw_noise(settings.latent_shape(bundle.variant), settings.seed)
            with attention():
                if index == 0:
                    make(pipe, settings, noise)
                made = make(pipe, settings, noise)
            yield made


def make(pipe: Pipeline, settings: Settings, noise: Tensor) -> Made:
    pipe.text_encoder.forget()
    seen: list[Tensor] = []

    def keep(progress: Progress) -> None:
        if progress.stage == "denoise" and progress.done == progress.total:
            assert progress.latents is not None
            seen.append(progress.latents.float().cpu().clone())

    video = pipe(settings, init_latents=noise, callback=keep)
    return Made(video.frames, seen[-1], sum(video.timings.values()))


@contextmanager
def another_attention(precision: str) -> Iterator[None]:
    """Another exact attention of torch's than what is first choice for a transformer's precision.

    On a GPU that is cuDNN's or flash in 16 bits, and the memory-efficient one in float32; on a CPU
    it is flash.
    """
    from wantrt.kernels.ops import ATTENTIONS

    others = [SDPBackend.MATH]
    if precision != "fp32":
        others.insert(0, SDPBackend.EFFICIENT_ATTENTION)  # a CPU has none and takes the next
    before = ATTENTIONS[:]
    ATTENTIONS[:] = [*others, SDPBackend.MATH]  # with a bias, the first is left out
    try:
        with sdpa_kernel(others, set_priority=True):  # of what does not take `ATTENTIONS`
            yield
    finally:
        ATTENTIONS[:] = before


def measure(
    bundle: Bundle,
    runtime: str,
    against: Bundle,
    against_runtime: str,
    jobs: Sequence[Mapping[str, Any]],
    requests: Sequence[Settings],
    residency: str = "resident",
) -> Iterator[Row]:
    """A row a job for the bundle, then one for the noise floor, and at the end one of all for each.

    jobs: "prompt" and "seed"; of nano's captions also what a video must show. requests: theirs, of
    `resolve_all`. What an interruption leaves is summed up too. Raises BenchError for bundles that
    cannot be compared.
    """
    refuse_strangers(bundle, against)
    precision = against.precision[against.variant.experts[0].name]
    expected = list(make_videos(against, against_runtime, requests, residency))
    rows: list[Row] = []
    try:
        for made, its, job in zip(
            make_videos(bundle, runtime, requests, residency), expected, jobs, strict=True
        ):
            rows.append({**compared(made, its, job), "noise_floor": False})
            yield rows[-1]
        noisy = make_videos(
            against, "torch", requests, residency, lambda: another_attention(precision)
        )
        for made, its, job in zip(noisy, expected, jobs, strict=True):
            rows.append({**noise_row(compared(made, its, job)), "noise_floor": True})
            yield rows[-1]
    except (Exception, KeyboardInterrupt):
        yield from summary(rows)
        raise
    yield from summary(rows)


def resolve_all(
    bundle: Bundle,
    runtime: str,
    against: Bundle,
    against_runtime: str,
    jobs: Sequence[Mapping[str, Any]],
    asked: Mapping[str, Any],
) -> list[Settings]:
    """Of every job, before anything is loaded. Raises SettingsError, and BenchError where the
    bundles recorded others."""
    requests = []
    for job in jobs:
        given = {**asked, "prompt": job["prompt"], "seed": job["seed"]}
        requests.append(resolve_for(bundle, runtime, **given))
        refuse_unequal(requests[-1], resolve_for(against, against_runtime, **given))
    return requests


def compared(made: Made, expected: Made, job: Mapping[str, Any]) -> Row:
    row: Row = {
        "name": f"{job['prompt']}, seed {job['seed']}",
        "prompt": job["prompt"],
        "seed": job["seed"],
        "psnr_db": psnr(made.frames, expected.frames),
        "ssim": ssim(made.frames, expected.frames),
        "latents_difference": float(
            (made.latents - expected.latents).norm() / expected.latents.norm()
        ),
        "e2e_s": made.seconds,
        "speedup": expected.seconds / made.seconds,
    }
    if all(aspect in job for aspect in ASPECTS):
        row |= {"right": is_right(made, job), "reference_right": is_right(expected, job)}
    return row


def noise_row(row: Row) -> Row:
    """Equal bits are no noise: what they have is no PSNR."""
    row["name"] += ", noise floor"
    if row["latents_difference"] == 0.0:
        del row["psnr_db"]
        row["says"] = NO_NOISE
    return row


def is_right(made: Made, job: Mapping[str, Any]) -> bool:
    """Whether a video shows the colour, shape and motion of its prompt."""
    verdict = judge(made.frames)
    return all(getattr(verdict, aspect) == job[aspect] for aspect in ASPECTS)


def summary(rows: Sequence[Row]) -> Iterator[Row]:
    """Of all jobs: the bundle, and the noise floor. Videos that are equal have no PSNR.

    `equal` counts them, of the noise floor those whose latents are equal as well.
    """
    for name, is_floor in (("all", False), ("all, noise floor", True)):
        of_kind = [row for row in rows if row["noise_floor"] == is_floor]
        if not of_kind:
            continue
        total: Row = {"name": name, "noise_floor": is_floor}
        total["equal"] = sum(math.isinf(row.get("psnr_db", math.inf)) for row in of_kind)
        if all("says" in row for row in of_kind):
            total["says"] = of_kind[0]["says"]
        for key in ("psnr_db", "ssim", "latents_difference", "e2e_s", "speedup"):
            values = [row[key] for row in of_kind if math.isfinite(row.get(key, math.inf))]
            total |= {key: spread(values, digits=7)} if values else {}
        for key in ("right", "reference_right"):
            if key in of_kind[0]:
                total[key] = sum(row[key] for row in of_kind) / len(of_kind)
        yield total


def refuse_strangers(bundle: Bundle, against: Bundle) -> None:
    one, other = (b.manifest.checkpoint.fingerprint for b in (bundle, against))
    if one != other:
        raise BenchError(
            f"{bundle.path} and {against.path} are of different checkpoints ({one[:8]}, "
            f"{other[:8]}): their videos differ by more than precision. Build both from the same"
        )


def refuse_unequal(settings: Settings, others: Settings) -> None:
    """Settings that the bundles recorded may differ."""
    mine, theirs = settings.as_dict(), others.as_dict()
    for key, value in mine.items():
        if theirs[key] != value:
            raise BenchError(
                f"unequal settings: {key} is {value} in the bundle and {theirs[key]} in the "
                "reference; say it on the command line"
            )


def read_jobs(
    prompts: Path | None, count: int, seeds: Sequence[int], captions: bool
) -> list[dict[str, Any]]:
    """The first prompts of a file, of nano's captions, or of `PROMPTS`; each with every seed."""
    if prompts is not None:
        found: list[dict[str, Any]] = [{"prompt": job.prompt} for job in well_read(prompts)]
    elif captions:
        found = [dict(entry) for entry in load_held_out()]
    else:
        found = [{"prompt": prompt} for prompt in PROMPTS]
    return [{**entry, "seed": seed} for entry in found[:count] for seed in seeds]


def well_read(path: Path) -> Iterator[Job]:
    for job in read_prompts(path):
        if isinstance(job, Exception):
            raise job
        yield job


@bench_command()
@click.option("--bundle", metavar="BUNDLE", help="A folder, or what ships. [default: nano]")
@click.option("--against", metavar="BUNDLE", help="The reference. [default: the same bundle]")
@click.option("--runtime", default="auto", show_default=True, metavar="NAME")
@click.option("--against-runtime", default="torch", show_default=True, metavar="NAME")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="One a line. [default: of nano, captions that it was not trained on; four others]",
)
@click.option("--count", type=click.IntRange(1), default=4, show_default=True, metavar="N")
@click.option(
    "--seeds",
    default="0,1",
    show_default=True,
    metavar="N,…",
    callback=list_of(int),
    help="Each prompt is made with each of them.",
)
@options(RESIDENCY, SIZE, FRAMES, STEPS, RESULT)
def command(
    console: Console,
    bundle: str | None,
    against: str | None,
    runtime: str,
    against_runtime: str,
    prompts: Path | None,
    count: int,
    seeds: Sequence[int],
    residency: str,
    out: Path,
    note: str | None,
    **asked: Any,
) -> int:
    """One bundle's videos beside another's, from the same latents: PSNR, SSIM, the noise floor.

    The noise floor is the reference itself with another exact attention. Of nano the judge says how
    many videos show what the prompt asks for ("right").
    """
    tested = open_bundle(bundle)
    reference = tested if against is None else open_bundle(against)
    refuse_strangers(tested, reference)
    runtimes = [
        choose_for(one, name).name
        for one, name in ((tested, runtime), (reference, against_runtime), (reference, "torch"))
    ]
    given = {name: value for name, value in asked.items() if value is not None}
    jobs = read_jobs(prompts, count, seeds, tested.variant.name == "nano")
    requests = resolve_all(tested, runtimes[0], reference, runtimes[1], jobs, given)
    settings = requests[0]
    if min(settings.size) < SMALLEST:
        raise SettingsError(f"SSIM needs frames of at least {SMALLEST}x{SMALLEST}")
    result = start(
        "quality",
        {
            **{f"bundle_{key}": value for key, value in describe_bundle(tested).items()},
            **{f"against_{key}": value for key, value in describe_bundle(reference).items()},
            "runtime": runtimes[0],
            "against_runtime": runtimes[1],
            "residency": residency,
            **{key: getattr(settings, key) for key in ASKED},
            "prompts": [job["prompt"] for job in jobs],
            "seeds": seeds,
        },
        note,
    )
    rows = measure(tested, runtimes[0], reference, runtimes[1], jobs, requests, residency)
    return run(console, result, rows, TABLE, out)
