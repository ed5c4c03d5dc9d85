"""The VAE: milliseconds and memory of each chunk, decoding and encoding, by size and runtime.

    wantrt bench vae --vae wan2.1,wan2.2 --size 224x128,416x256 --runtime onnxruntime,torch

A video is decoded one latent frame at a time: a first chunk of one frame, then chunks of four,
which read and write the caches; encoding likewise. Weights are generated at full size. A chunk of
the decoder is timed as the runtime runs it, on a GPU as a replay: whatever --warmup says, its two
kinds of next chunk run twice before, as they are and captured. A chunk of the encoder is timed as a
session runs it. Decoder and encoder of each size and runtime have a process each, because memory
that was freed once hides what the next one takes; on a CPU weights are mapped files and count for
nothing.
"""

import multiprocessing
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from wantrt.bench.bundles import choose_bundle
from wantrt.bench.floor import Cost, component_cost
from wantrt.bench.generated import generated
from wantrt.bench.memory import PeakMemory, Peaks
from wantrt.bench.options import RESULT, RUNTIMES, options, repeats
from wantrt.bench.rates import Rates, measure_rates
from wantrt.bench.result import Row, Table, number, run, spread, start, text
from wantrt.build import choose_precision
from wantrt.bundle import Bundle
from wantrt.cli.build import list_of
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.config import VARIANTS, Size
from wantrt.device import Device
from wantrt.errors import BenchError
from wantrt.jobs import parse_size
from wantrt.linked import refuse_other_names
from wantrt.models.components import part_components
from wantrt.names import check_name
from wantrt.runtime import loading
from wantrt.runtime.decoder import Decoder
from wantrt.runtime.encoder import encode
from wantrt.runtime.parts import load_part
from wantrt.runtime.settings import check_size
from wantrt.runtime.sizes import vae_symbols
from wantrt.session import PRECISIONS, Range, Session, Tensors, TensorSpec

refuse_other_names(__spec__)

VAES = {"wan2.1": "t2v-1.3b", "wan2.2": "ti2v-5b", "nano": "nano"}  # -> a variant that has it
CPU_SIZES, GPU_SIZES = ((224, 128),), ((832, 480), (1280, 704))
CAPTURED = 4  # next chunks of a decoder until all are replays: two graphs, each after a run

TABLE = Table(
    (
        ("VAE", lambda row: f"{row['vae']} {row['size']}"),
        ("chunk", text("chunk")),
        ("runtime", text("runtime")),
        ("ms", number("chunk_ms", 1)),
        ("p10", number("chunk_ms", 1, part="p10")),
        ("p90", number("chunk_ms", 1, part="p90")),
        ("floor", number("floor_fraction", 0, "%", 100)),
        ("MiB", number("peak_bytes", 0, scale=2**-20)),
    )
)


@dataclass(frozen=True)
class Case:
    """What is measured in two processes. runs: of every kind of chunk, after `warmup` of them."""

    vae: str
    runtime: str
    size: Size
    warmup: int
    runs: int

    @property
    def name(self) -> str:
        return f"{self.vae} {self.size[0]}x{self.size[1]}"


def measure(
    cases: Sequence[tuple[Case, Bundle]], rates: Mapping[str, Rates], apart: bool = True
) -> Iterator[Row]:
    """Four rows a case: decoder and encoder, first and next chunk.

    rates: of a runtime. apart: each half in a process of its own. Raises BenchError for one that
    was killed.
    """
    for case, bundle in cases:
        costs = chunk_costs(bundle, case.size)
        for which in HALVES:
            if apart:
                what = f"the {which} of {case.name} on {case.runtime}"
                found, memory = run_apart(what, measure_half, case, bundle, which)
            else:
                found, memory = measure_half(case, bundle, which)
            for order in ("first", "next"):
                kind, times = f"{which} {order}", spread(found[order])
                cost = costs[kind]
                floor_ms = 1e3 * cost.seconds(rates[case.runtime])
                frames = 1 if order == "first" else bundle.variant.vae.temporal_stride
                yield {
                    "name": f"{case.name} {kind} {case.runtime}",
                    "vae": case.vae,
                    "size": f"{case.size[0]}x{case.size[1]}",
                    "chunk": kind,
                    "runtime": case.runtime,
                    "precision": precision_of(bundle, kind),
                    "chunk_ms": times,
                    "frame_ms": times["median"] / frames,
                    "floor_ms": floor_ms,
                    "floor_fraction": floor_ms / times["median"],
                    "flops": cost.flops,
                    "weight_bytes": cost.weight_bytes,
                    **memory,
                }


def run_apart(what: str, work: Callable[..., Any], *given: Any) -> Any:
    """What `work` returns, of a new process. Raises BenchError if that is killed."""
    context = multiprocessing.get_context("spawn")
    start_with = begin_apart, (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, *start_with) as pool:
        try:
            return pool.submit(work, *given).result()
        except BrokenProcessPool:
            raise BenchError(
                f"the process that measured {what} was killed, probably for its memory; "
                "take a smaller --size"
            ) from None


def begin_apart(threads: int) -> None:
    """In the new process, which Ctrl-C ends at once and silently."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # inherited, in a background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)


def measure_half(
    case: Case, bundle: Bundle, which: str
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Milliseconds of the runs of "first" and "next", and the peak memory of decoder or encoder."""
    runtime = loading.RUNTIMES[case.runtime]
    device = runtime.make_device()
    peaks = Peaks(device.torch_device)
    with PeakMemory() as memory:
        sessions = load_part(bundle, "vae", runtime, device, prefix=f"vae_{which}")
        chunk_ms = HALVES[which](case, bundle, sessions, device)
    if device.torch_device.type != "cuda":
        return chunk_ms, {"peak_bytes": memory.peak_bytes - memory.start_bytes}
    taken = peaks.row()
    return chunk_ms, {**taken, "peak_bytes": taken["peak_allocated_bytes"]}


def decode_video(
    case: Case, bundle: Bundle, sessions: Mapping[str, Sequence[Session]], device: Device
) -> dict[str, list[float]]:
    """A video a run for the first chunk; one with all runs for the next.

    The warm-up has as many next chunks as capture them.
    """
    vae = bundle.variant.vae
    cells = vae_symbols(bundle.variant, case.size)
    decoder = Decoder(vae, sessions, device)
    chunk_ms: dict[str, list[float]] = defaultdict(list)
    for firsts, following in ((case.warmup, max(case.warmup, CAPTURED)), (case.runs, case.runs)):
        chunk_ms.clear()
        for chunks in [1] * firsts + [following + 1]:
            shape = (1, vae.z_dim, chunks, cells["h"], cells["w"])
            latent = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            latent = latent.to(device.torch_device)
            with torch.inference_mode(), device.stream():
                begun = time.perf_counter()
                for index, _ in enumerate(decoder.decode(latent)):
                    device.synchronize()
                    now = time.perf_counter()
                    chunk_ms["next" if index else "first"].append(1e3 * (now - begun))
                    begun = time.perf_counter()
    return chunk_ms


def encode_video(
    case: Case, bundle: Bundle, sessions: Mapping[str, Sequence[Session]], device: Device
) -> dict[str, list[float]]:
    """The same for the encoder."""
    chunk_ms: dict[str, list[float]] = defaultdict(list)
    timed = {
        name: [Timed(one, chunk_ms[name.removeprefix("vae_encoder_")], device) for one in every]
        for name, every in sessions.items()
    }
    stride = bundle.variant.vae.temporal_stride
    for lengths in (case.warmup, case.runs):
        for times in chunk_ms.values():
            times.clear()
        for chunks in [1] * lengths + [lengths + 1]:
            shape = (1, 3, 1 + stride * (chunks - 1), case.size[1], case.size[0])
            pixels = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
            with torch.inference_mode(), device.stream():
                encode(bundle.variant.vae, timed, device, pixels.to(device.torch_device))
    return chunk_ms


HALVES = {"decoder": decode_video, "encoder": encode_video}


@dataclass(frozen=True)
class Timed:
    """A session whose runs are timed, in milliseconds."""

    session: Session
    times: list[float]
    device: Device

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.session.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.session.outputs

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        return self.session.serves

    def prepare(self, symbols: Mapping[str, int]) -> None:
        self.session.prepare(symbols)

    def bind(self, name: str, tensor: Tensor) -> None:
        self.session.bind(name, tensor)

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        self.device.synchronize()
        begun = time.perf_counter()
        results = self.session.run(inputs, outputs)
        self.device.synchronize()
        self.times.append(1e3 * (time.perf_counter() - begun))
        return results


def chunk_costs(bundle: Bundle, size: Size) -> dict[str, Cost]:
    """Kind of chunk -> its cost."""
    dtype = PRECISIONS[bundle.precision["vae"]]
    symbols = vae_symbols(bundle.variant, size)
    return {
        component.name.removeprefix("vae_").replace("_", " "): component_cost(component, symbols)
        for component in part_components(bundle.variant, "vae", dtype)
    }


def precision_of(bundle: Bundle, kind: str) -> str:
    """The encoder is float32 in every bundle."""
    return "fp32" if kind.startswith("encoder") else bundle.precision["vae"]


@bench_command()
@click.option(
    "--vae",
    "vaes",
    default="wan2.1,wan2.2",
    show_default=True,
    metavar="NAME,…",
    callback=list_of(str),
    help="wan2.1, wan2.2 or nano.",
)
@click.option(
    "--size",
    "sizes",
    metavar="WxH,…",
    callback=list_of(parse_size),
    help="Pixels. [default: 224x128; on a GPU 832x480 and 1280x704; of nano its own]",
)
@click.option("--precision", metavar="NAME", help="Of the decoder. [default: the runtime's]")
@options(RUNTIMES, repeats(), RESULT)
def command(
    console: Console,
    vaes: Sequence[str],
    sizes: Sequence[Size] | None,
    precision: str | None,
    runtimes: Sequence[str],
    warmup: int,
    runs: int,
    out: Path,
    note: str | None,
) -> int:
    """Decoder and encoder: milliseconds and memory of a chunk, by size and runtime.

    "first" is a chunk of one frame, "next" one of four. "floor" is the share of the best that this
    machine's measured rates allow.
    """
    chosen = [loading.choose_runtime(name, (precision,) if precision else ()) for name in runtimes]
    asked = []
    for vae in vaes:
        check_name("vae", vae, VAES)
        variant = VARIANTS[VAES[vae]]
        for runtime in chosen:
            usual = GPU_SIZES if runtime.on_gpu() else CPU_SIZES
            mine = sizes or ((variant.size,) if vae == "nano" else usual)
            for size in mine:
                check_size(variant, size)
            asked.append((vae, runtime, mine))
    choices = [
        choose_bundle(
            *(None, VAES[vae], source_of(vae), precision),
            runtimes=[runtime.name],
            sizes=mine,
            frames=[5],
        )
        for vae, runtime, mine in asked
    ]
    result = start(
        "vae",
        {
            "vaes": vaes,
            "cases": [[vae, runtime.name, mine] for vae, runtime, mine in asked],
            "precision": precision,
            "threads": torch.get_num_threads(),
            "warmup": warmup,
            "runs": runs,
        },
        note,
    )
    rates = {
        runtime.name: measure_rates(
            runtime.make_device().torch_device,
            PRECISIONS[choose_precision(runtime.name, precision)],
        )
        for runtime in chosen
    }
    result.machine["rates"] = asdict(next(iter(rates.values())))

    def rows() -> Iterator[Row]:
        for (vae, runtime, mine), choice in zip(asked, choices, strict=True):
            with console.progress() as progress:
                bundle = choice.open(progress)
            cases = [(Case(vae, runtime.name, size, warmup, runs), bundle) for size in mine]
            yield from measure(cases, rates)

    return run(console, result, rows(), TABLE, out)


def source_of(vae: str) -> str | None:
    """A whole VAE with little around it."""
    return None if vae == "nano" else generated(0, ("vae",))
