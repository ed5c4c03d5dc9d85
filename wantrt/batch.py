"""Videos from jobs, one after another, by one loaded pipeline.

All that can be wrong with a job is found before the pipeline is loaded. A job that fails leaves no
file and does not keep the next one from running.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from wantrt.bundle import Bundle
from wantrt.errors import MediaError, WantrtError
from wantrt.folder import Progress, silent
from wantrt.jobs import Job, default_name
from wantrt.media import VideoWriter, check_output
from wantrt.runtime.latents import check_latents_file, load_latents, save_latents
from wantrt.runtime.loading import choose_for
from wantrt.runtime.pipeline import Pipeline
from wantrt.runtime.pipeline import Progress as Stage
from wantrt.runtime.settings import Settings
from wantrt.runtime.sizes import resolve_for


@dataclass(frozen=True)
class Made:
    """A video that was made. timings: seconds by phase; seconds: with encoding, without loading."""

    out: Path
    settings: Settings
    timings: dict[str, float]
    seconds: float
    latents: Path | None


@dataclass(frozen=True)
class Failed:
    """A job that gave no video."""

    prompt: str | None
    error: Exception


@dataclass(frozen=True)
class _Ready:
    """A job that was checked."""

    out: str  # a folder of pngs ends with "/"
    settings: Settings
    init_latents: Tensor | None
    latents: Path | None


def generate_all(
    bundle: Bundle,
    jobs: Sequence[Job | WantrtError],
    *,
    runtime: str | None = None,
    residency: str = "resident",
    text_encoder_on: str | None = None,
    trust_plans: bool = False,
    folder: Path = Path(),
    overwrite: bool = False,
    progress: Progress = silent,
) -> Iterator[Made | Failed]:
    """Make the videos in order; an error in the list of jobs is passed on as a failure.

    runtime, residency, text_encoder_on, trust_plans: as for `Pipeline.load`. folder: where a job
    without `out` puts its video. Raises what keeps all of them from running:
    BundleError, RuntimeUnavailableError, UnsupportedTaskError.
    """
    chosen = choose_for(bundle, runtime)
    ready = list(_check_all(bundle, jobs, chosen.name, folder, overwrite))
    if not any(isinstance(item, _Ready) for item in ready):
        yield from (item for item in ready if isinstance(item, Failed))
        return
    progress("load", 0, 1)
    with Pipeline.load(
        bundle.path,
        chosen.name,
        residency=residency,
        text_encoder_on=text_encoder_on,
        trust_plans=trust_plans,
    ) as pipe:
        progress("load", 1, 1)
        for number, item in enumerate(ready, 1):
            if isinstance(item, Failed):
                yield item
                continue
            label = f"{number}/{len(ready)} " if len(ready) > 1 else ""
            try:
                yield _make(pipe, item, overwrite, label, progress)
            except Exception as error:
                yield Failed(item.settings.prompt, error)


def _check_all(
    bundle: Bundle,
    jobs: Iterable[Job | WantrtError],
    runtime: str,
    folder: Path,
    overwrite: bool,
) -> Iterator[_Ready | Failed]:
    outs: set[Path] = set()
    for job in jobs:
        if isinstance(job, Exception):
            yield Failed(None, job)
            continue
        try:
            ready = _check(bundle, job, runtime, folder, overwrite)
            for path in [Path(ready.out), *([ready.latents] if ready.latents else [])]:
                if path.resolve() in outs:
                    raise MediaError(f"{path} would be written twice; name another file")
                outs.add(path.resolve())
            yield ready
        except WantrtError as error:
            yield Failed(job.prompt, error)


def _check(bundle: Bundle, job: Job, runtime: str, folder: Path, overwrite: bool) -> _Ready:
    settings = resolve_for(bundle, runtime, prompt=job.prompt, **job.settings)
    name = default_name(job.prompt, settings.seed, settings.num_frames)
    out = job.out or str(folder / name)
    width, height = settings.size
    check_output(out, overwrite, (settings.num_frames, height, width, 3))
    if job.latents is not None:
        shape = settings.latent_shape(bundle.variant)
        check_latents_file(job.latents, overwrite, prod(shape) * 4)
    init_latents = load_latents(job.init_latents) if job.init_latents else None
    return _Ready(out, settings, init_latents, job.latents)


def _make(pipe: Pipeline, ready: _Ready, overwrite: bool, label: str, progress: Progress) -> Made:
    final: list[Tensor] = []

    def report(stage: Stage) -> None:
        progress(f"{label}{stage.stage}", stage.done, stage.total)
        if ready.latents and stage.latents is not None and stage.done == stage.total:
            final.append(stage.latents.clone())

    start = time.perf_counter()
    timings: dict[str, float] = {}
    settings = ready.settings
    frames = pipe.stream(
        settings, init_latents=ready.init_latents, callback=report, timings=timings
    )
    with VideoWriter(ready.out, pipe.variant.fps, pipe.metadata(settings), overwrite) as writer:
        for chunk in frames:
            writer.write(chunk)
        if ready.latents is not None:
            save_latents(ready.latents, final[0])
    return Made(writer.path, settings, timings, time.perf_counter() - start, ready.latents)
