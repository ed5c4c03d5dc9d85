"""The VAE: milliseconds and memory of each chunk, decoding and encoding, by size and runtime.

    wantrt bench vae --vae wan2.1,wan2.2 --size 224x128,416x256 --runtime onnxruntime,torch

A video is decoded one latent frame at a time: a first chunk of one frame, then chunks of four,
which read and write the caches; encoding likewise. Weights are generated at full size. A chunk of
the decoder is timed as the runtime runs it (captured on a GPU), a chunk of the encoder as a session
runs it. Each size and runtime has a process of its own, because memory that was freed once hides
what the next one takes; weights are mapped files and count for nothing on a CPU.
"""

import multiprocessing
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """What a process measures. runs: of every kind of chunk, after `warmup` of them."""

    vae: str
    runtime: str
    size: Size
    warmup: int
    runs: int

    @property
    def num_frames(self) -> int:
        """So many that a video has all runs of the next chunk."""
        return 1 + 4 * self.runs


def measure(
    cases: Sequence[tuple[Case, Bundle]], rates: Mapping[str, Rates], apart: bool = True
) -> Iterator[Row]:
    """Four rows a case: decoder and encoder, first and next chunk.

    rates: of a runtime. apart: in a process of its own.
    """
    processes = multiprocessing.get_context("spawn")
    for case, bundle in cases:
        if apart:
            with processes.Pool(1) as pool:
                found = pool.apply(measure_case, (case, bundle, torch.get_num_threads()))
        else:
            found = measure_case(case, bundle)
        costs = chunk_costs(bundle, case.size)
        for kind, (chunk_ms, memory) in found.items():
            cost = costs[kind]
            floor_ms = 1e3 * cost.seconds(rates[case.runtime])
            times = spread(chunk_ms)
            frames = 1 if kind.endswith("first") else bundle.variant.vae.temporal_stride
            yield {
                "name": f"{case.vae} {case.size[0]}x{case.size[1]} {kind} {case.runtime}",
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


def measure_case(
    case: Case, bundle: Bundle, threads: int | None = None
) -> dict[str, tuple[list[float], dict[str, int]]]:
    """Kind of chunk -> milliseconds of its runs, and the peak memory of decoder or encoder."""
    if threads is not None:
        torch.set_num_threads(threads)
    runtime = loading.RUNTIMES[case.runtime]
    device = runtime.make_device()
    found = {}
    for which, work in (("decoder", decode_video), ("encoder", encode_video)):
        peaks = Peaks(device.torch_device)
        with PeakMemory() as memory:
            sessions = load_part(bundle, "vae", runtime, device, prefix=f"vae_{which}")
            chunks = work(case, bundle, sessions, device)
        taken = {"peak_bytes": memory.peak_bytes - memory.start_bytes}
        if device.torch_device.type == "cuda":
            taken = {**peaks.row(), "peak_bytes": peaks.row()["peak_allocated_bytes"]}
        for order in ("first", "next"):
            found[f"{which} {order}"] = chunks[order], taken
        del sessions
    return found


def decode_video(
    case: Case, bundle: Bundle, sessions: Mapping[str, Sequence[Session]], device: Device
) -> dict[str, list[float]]:
    """A video a run for the first chunk; one with all runs for the next."""
    vae = bundle.variant.vae
    cells = vae_symbols(bundle.variant, case.size)
    decoder = Decoder(vae, sessions, device)
    chunk_ms: dict[str, list[float]] = defaultdict(list)
    for lengths in (case.warmup, case.runs):
        chunk_ms.clear()
        for chunks in [1] * lengths + [lengths + 1]:
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
