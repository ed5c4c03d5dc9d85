"""Many requests to one pipeline, which serves one at a time: videos an hour, latency, waiting.

    wantrt bench throughput                                     # nano, which ships
    wantrt bench throughput --prompts prompts.txt --concurrency 1,2 --rate 0.5

Closed loop: `concurrency` clients, each of which asks for its next video when it has one. Open
loop: requests come as a Poisson process, whether or not earlier ones are served; its rate is a
share of what the first closed loop has served, or given. Requests wait in one queue, in order.

`latency_s` is from asking to all pixels in the host's memory, `queue_s` the part of it before the
pipeline begins, `service_s` the rest. Every request pays for its text: no prompt is remembered. A
case ends after --requests or --seconds; who still waits then is `unserved`, and in no percentile.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any

import click
import numpy as np

from wantrt.bench.bundles import choose_bundle, describe_bundle
from wantrt.bench.memory import Peaks
from wantrt.bench.options import (
    BUNDLE,
    FRAMES,
    RESIDENCY,
    RESULT,
    RUNTIME,
    SAMPLING,
    SEED,
    SIZE,
    STEPS,
    options,
)
from wantrt.bench.request import check_request, describe_request, given_of, make_request, serve
from wantrt.bench.result import Row, Table, number, run, spread, start, text
from wantrt.cli.build import list_of
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.errors import SettingsError
from wantrt.jobs import read_prompts
from wantrt.linked import refuse_other_names
from wantrt.runtime.loading import choose_for
from wantrt.runtime.pipeline import Pipeline
from wantrt.runtime.settings import Settings

refuse_other_names(__spec__)

PROMPTS = (
    "a red circle moves right",
    "a blue square moves down",
    "a yellow star grows",
    "a green triangle rotates",
    "a purple square moves up on a black background",
)
TABLE = Table(
    (
        ("load", text("name")),
        ("videos", number("videos", 0)),
        ("videos/h", number("videos_per_hour", 0)),
        ("fps", number("frames_per_second", 1)),
        ("latency s", number("latency_s")),
        ("p90", number("latency_s", part="p90")),
        ("p99", number("latency_s", part="p99")),
        ("queue s", number("queue_s")),
        ("queue p90", number("queue_s", part="p90")),
        ("busy", number("busy_fraction", 0, "%", 100)),
    )
)


# -- The queue ------------------------------------------------------------------------------------


@dataclass(eq=False)
class Request:
    """A video that somebody waits for; moments of time.perf_counter."""

    settings: Settings
    asked: float
    begun: float | None = None
    done: float | None = None
    over: Event = field(default_factory=Event)  # it was served, or will not be


class Queue:
    """Requests in the order in which they were asked. Clients ask from threads of their own."""

    def __init__(self, videos: Sequence[Settings], requests: int, seconds: float) -> None:
        self._videos, self._requests, self._seconds = videos, requests, seconds
        self._line: SimpleQueue[Request | None] = SimpleQueue()
        self._lock = Lock()
        self._end = float("inf")
        self.asked: list[Request] = []
        self.closed = Event()

    def ask(self, now: float) -> Request | None:
        """By a client. None: no more are taken."""
        with self._lock:
            if not self.takes(now):
                return None
            count = len(self.asked)
            settings = self._videos[count % len(self._videos)]
            request = Request(replace(settings, seed=(settings.seed + count) % 2**64), now)
            self.asked.append(request)
            self._line.put(request)
            return request

    def takes(self, moment: float) -> bool:
        """Whether what is asked at that moment is still taken."""
        full = len(self.asked) >= self._requests
        return not full and not self.closed.is_set() and moment < self._end

    def serve(self, pipe: Pipeline, clients: Sequence["Client"]) -> None:
        """Let the clients ask, and serve them one at a time until they ask no more."""
        self._end = time.perf_counter() + self._seconds
        threads = [Thread(target=self._run, args=(client,), daemon=True) for client in clients]
        try:
            for thread in threads:
                thread.start()
            asking = len(threads)
            while asking:
                request = self._line.get()
                if request is None:
                    asking -= 1
                elif time.perf_counter() < self._end:
                    request.begun = time.perf_counter()
                    serve(pipe, request.settings)
                    request.done = time.perf_counter()
                    request.over.set()
                else:
                    request.over.set()
        finally:
            with self._lock:
                self.closed.set()
                for request in self.asked:
                    request.over.set()
            for thread in threads:
                with suppress(RuntimeError):  # it was never started
                    thread.join()

    def _run(self, client: "Client") -> None:
        try:
            client(self)
        finally:
            self._line.put(None)


Client = Callable[[Queue], None]


def closed_client(queue: Queue) -> None:
    """Asks again when it has its video."""
    while request := queue.ask(time.perf_counter()):
        request.over.wait()


def poisson_client(rate: float, seed: int) -> Client:
    """Asks `rate` times a second in the mean, and does not wait."""

    def client(queue: Queue) -> None:
        gaps = np.random.default_rng(seed)
        moment = time.perf_counter() + gaps.exponential(1 / rate)
        while queue.takes(moment):
            queue.closed.wait(max(moment - time.perf_counter(), 0))
            queue.ask(moment)
            moment += gaps.exponential(1 / rate)

    return client


# -- What is measured -----------------------------------------------------------------------------


def measure(
    pipe: Pipeline,
    videos: Sequence[Settings],
    *,
    concurrency: Sequence[int] = (1, 2, 4),
    loads: Sequence[float] = (0.5, 0.9),
    rates: Sequence[float] = (),
    requests: int = 20,
    seconds: float = 60.0,
    warmup: int = 2,
    seed: int = 0,
) -> Iterator[Row]:
    """A row for each closed loop and, after them, for each open one; after an interruption, of the
    requests that were served.

    loads: rates as shares of what the first closed loop serves. rates: requests a second.
    """
    peaks = Peaks(pipe.device.torch_device)
    shapes = {(v.size, v.num_frames, v.num_inference_steps): v for v in videos}
    for video in [*shapes.values(), *islice(cycle(videos), max(warmup - len(shapes), 0))]:
        serve(pipe, video, peaks.look)
    capacity: float | None = None
    for clients in concurrency:
        queue = Queue(videos, requests, seconds)
        told = f"{clients} client{'s' if clients > 1 else ''}"
        row: Row = {"name": told, "mode": "closed", "concurrency": clients}
        for found in served_row(queue, pipe, [closed_client] * clients):
            yield row | found | peaks.row()
        capacity = capacity or figures(queue.asked)["videos_per_hour"] / 3600
    asked: list[tuple[float, float | None]] = [(rate, None) for rate in rates]
    asked += [(load * capacity, load) for load in loads if capacity]
    for rate, load in asked:
        queue = Queue(videos, requests, seconds)
        name = f"open at {rate:.3g}/s" if load is None else f"open at {load:.0%}"
        row = {"name": name, "mode": "open", "rate_per_s": rate, "load_fraction": load}
        for found in served_row(queue, pipe, [poisson_client(rate, seed)]):
            yield row | found | peaks.row()


def served_row(queue: Queue, pipe: Pipeline, clients: Sequence[Client]) -> Iterator[Row]:
    """One, also before what interrupts goes on, unless nothing was served until then."""
    try:
        queue.serve(pipe, clients)
    except (Exception, KeyboardInterrupt):
        if any(request.done is not None for request in queue.asked):
            yield figures(queue.asked)
        raise
    yield figures(queue.asked)


def figures(asked: Sequence[Request]) -> Row:
    """Of all requests of a case, in the order in which they came."""
    served = [(r, r.begun, r.done) for r in asked if r.begun is not None and r.done is not None]
    if not served:
        return {"videos": 0, "unserved": len(asked), "videos_per_hour": 0.0}
    elapsed = max(done for _, _, done in served) - min(r.asked for r in asked)
    frames = sum(r.settings.num_frames for r, _, _ in served)
    return {
        "videos": len(served),
        "unserved": len(asked) - len(served),
        "elapsed_s": elapsed,
        "videos_per_hour": len(served) / elapsed * 3600,
        "frames_per_second": frames / elapsed,
        "latency_s": spread([done - r.asked for r, _, done in served]),
        "queue_s": spread([begun - r.asked for r, begun, _ in served]),
        "service_s": spread([done - begun for _, begun, done in served]),
        "busy_fraction": sum(done - begun for _, begun, done in served) / elapsed,
    }


# -- The command ----------------------------------------------------------------------------------


def positive(parse: Callable[[str], float], least: float) -> Callable[[str], Any]:
    def read(text: str) -> float:
        number = parse(text)
        if not least <= number < float("inf"):
            raise ValueError(f"{text} is not a number from {least:g} on")
        return number

    return read


@bench_command()
@options(
    *(BUNDLE, RUNTIME, RESIDENCY, SIZE, FRAMES, STEPS, SAMPLING, SEED),
    click.option(
        "--prompts",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="As for wantrt generate; where it says to write files, they are not. [default: five]",
    ),
    click.option(
        "--concurrency",
        default="1,2,4",
        show_default=True,
        metavar="N,…",
        callback=list_of(positive(int, 1)),
        help="Closed loops: clients that wait.",
    ),
    click.option(
        "--load",
        "loads",
        default="0.5,0.9",
        show_default=True,
        metavar="X,…",
        callback=list_of(positive(float, 1e-3)),
        help="Open loops: rates as shares of the first closed loop's.",
    ),
    click.option(
        "--rate",
        "rates",
        metavar="X,…",
        callback=list_of(positive(float, 1e-6)),
        help="Instead of --load: requests a second.",
    ),
    click.option("--requests", type=click.IntRange(min=1), default=20, show_default=True),
    click.option(
        "--seconds",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        help="Of a case, at most; the request at work is finished.",
    ),
    click.option("--warmup", type=click.IntRange(min=1), default=2, show_default=True),
    RESULT,
)
def command(
    console: Console,
    bundle: Path | None,
    variant: str | None,
    checkpoint: str | None,
    precision: str | None,
    trust_plans: bool,
    runtime: str,
    residency: str,
    prompts: Path | None,
    concurrency: tuple[int, ...],
    loads: tuple[float, ...],
    rates: tuple[float, ...] | None,
    requests: int,
    seconds: float,
    warmup: int,
    out: Path,
    note: str | None,
    **asked: Any,
) -> int:
    """Many requests: videos an hour, latency and waiting, in closed and in open loops."""
    jobs = [{**given_of(asked), **job} for job in read_jobs(prompts)]
    choice = choose_bundle(
        *(bundle, variant, checkpoint, precision),
        runtimes=[runtime],
        draw=residency == "resident",
        sizes=sorted({job["size"] for job in jobs if "size" in job}) or None,
        frames=sorted({job["num_frames"] for job in jobs if "num_frames" in job}) or None,
    )
    for job in jobs:
        check_request(choice.variant, job)
    with console.progress() as progress:
        loaded = choice.open(progress)
    chosen = choose_for(loaded, runtime).name
    videos = [make_request(loaded, chosen, job) for job in jobs]
    settings = {
        **describe_bundle(loaded),
        "videos": [describe_request(video) for video in videos],
        "runtime": chosen,
        "residency": residency,
        "concurrency": concurrency,
        "rates": rates,
        "loads": None if rates else loads,
        "requests": requests,
        "seconds": seconds,
        "warmup": warmup,
        "seed": asked["seed"],
    }
    result = start("throughput", settings, note)
    with Pipeline.load(loaded, chosen, residency=residency, trust_plans=trust_plans) as pipe:
        rows = measure(
            pipe,
            videos,
            concurrency=concurrency,
            loads=() if rates else loads,
            rates=rates or (),
            requests=requests,
            seconds=seconds,
            warmup=warmup,
            seed=asked["seed"],
        )
        return run(console, result, rows, TABLE, out)


def read_jobs(prompts: Path | None) -> list[dict[str, Any]]:
    """Arguments of `Pipeline`, of each line of the file. Raises the first line's error."""
    if prompts is None:
        return [{"prompt": prompt} for prompt in PROMPTS]
    jobs: list[dict[str, Any]] = []
    for job in read_prompts(prompts):
        if isinstance(job, SettingsError):
            raise job
        jobs.append({**job.settings, "prompt": job.prompt})
    return jobs
