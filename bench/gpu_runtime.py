"""What graphs and residency are worth on a GPU, with torch sessions: nano, and 1.3B at full size.

    python -m wantrt.bench.gpu_runtime [--steps N] [--only nano] [--out FOLDER]

A denoising step is timed eager, captured, and with streamed weights; the decoder's chunk eager and
captured. Weights are generated on the GPU: random, of the real shapes, bfloat16. 1.3B runs at
832x480 with 81 frames: 32,760 tokens, guidance as a batch of two. Times are of CUDA events on the
device's stream after a warm-up; the median with p10 and p90. Beside each stands whether its result
has the bits of the eager one: a speed without that is none. Needs a GPU, torch and numpy alone.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrt.bench.gpu import output_options, require_gpu
from wantrt.bench.result import Row, Table, number, publish, spread, start, text
from wantrt.config import VARIANTS, Size, Variant
from wantrt.device import CUDADevice
from wantrt.linked import refuse_other_names
from wantrt.models.components import Component, part_components
from wantrt.runtime.decoder import Decoder
from wantrt.runtime.denoiser import Denoiser, Stage, Transformer
from wantrt.runtime.loading import Files
from wantrt.runtime.parts import STREAMED
from wantrt.runtime.residency import Sessions
from wantrt.runtime.sizes import dit_symbols
from wantrt.runtime.streaming import stream_sessions
from wantrt.runtime.torch_session import load_sessions
from wantrt.schedulers.grids import make_grid
from wantrt.session import Session, Tensors

refuse_other_names(__spec__)

DTYPE = torch.bfloat16
CASES: dict[str, tuple[Size, int]] = {"nano": ((64, 64), 25), "t2v-1.3b": ((832, 480), 81)}
WARM_UP = 2  # an ordinary run and the capture


TABLE = Table(
    (
        ("what", text("name")),
        ("step ms", number("step_ms", 3)),
        ("chunk ms", number("chunk_ms", 3)),
        ("bits", lambda row: "as eager" if row["same_bits_as_eager"] else "OTHER"),
        ("GiB", number("peak_allocated_bytes", 2, scale=2**-30)),
    )
)


class Eager(CUDADevice):
    """Captures nothing."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="timed, after two of warm-up")
    parser.add_argument("--only", choices=CASES)
    output_options(parser)
    options = parser.parse_args()
    require_gpu("wantrt.bench.gpu_runtime")
    told = {"dtype": DTYPE, "steps": options.steps, "only": options.only}
    result = start("gpu_runtime", told, options.note)
    with publish(result, options.out):
        for name, (size, num_frames) in CASES.items():
            if options.only in (None, name):
                for row in measure(VARIANTS[name], size, num_frames, options.steps):
                    result.rows.append(row)
                    show(row)


def measure(variant: Variant, size: Size, num_frames: int, steps: int) -> Iterator[Row]:
    """A row of steps and one of chunks for each mode: milliseconds, parity, peak memory."""
    shape = {
        "size": "{}x{}".format(*size),
        "frames": num_frames,
        "tokens": dit_symbols(variant, size, num_frames, guided=True)["L"],
    }
    latents: dict[str, Tensor] = {}
    chunks: dict[str, Tensor] = {}
    for mode in ("eager", "captured", "streamed"):
        device = Eager() if mode == "eager" else CUDADevice()
        torch.cuda.reset_peak_memory_stats()
        times, latents[mode] = time_steps(
            variant, size, num_frames, steps, device, streamed=mode == "streamed"
        )
        same = torch.equal(latents[mode], latents["eager"])
        yield {"name": f"{variant.name}: step {mode}", **shape, **summary("step", times, same)}
        torch.cuda.empty_cache()
        if mode != "streamed":
            torch.cuda.reset_peak_memory_stats()
            times, chunks[mode] = time_chunks(variant, latents["eager"], steps, device)
            same = torch.equal(chunks[mode], chunks["eager"])
            yield {"name": f"{variant.name}: chunk {mode}", **summary("chunk", times, same)}
            torch.cuda.empty_cache()


def time_steps(
    variant: Variant, size: Size, num_frames: int, steps: int, device: CUDADevice, streamed: bool
) -> tuple[list[float], Tensor]:
    """Milliseconds of each guided step after the warm-up, and the last latent, on the host."""
    (expert,) = variant.experts
    total = steps + WARM_UP
    grid = make_grid("unipc", "official", total, variant.flow_shift)
    width, height = (side // variant.vae.spatial_stride for side in size)
    shape = (1, variant.vae.z_dim, (num_frames - 1) // variant.vae.temporal_stride + 1)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(*shape, height, width, generator=generator)
    rows = (1, expert.dit.text_len, expert.dit.text_dim)
    texts = [torch.randn(rows, generator=generator) for _ in range(2)]
    with torch.inference_mode(), device.stream():
        components = part_components(variant, expert.name, DTYPE)
        sessions = make_sessions(components, device, streamed)
        stages = [Stage(Transformer(expert.dit, sessions), range(total), expert.guidance_scale)]
        start, text, negative = (tensor.to(device.torch_device) for tensor in (noise, *texts))
        denoiser = Denoiser(device, captures=not streamed)
        run = denoiser.run(stages, grid, "unipc", start, text, negative)
        return time_each(run)


def time_chunks(
    variant: Variant, latent: Tensor, steps: int, device: CUDADevice
) -> tuple[list[float], Tensor]:
    """Milliseconds of each chunk of four frames after the warm-up, and the last one's pixels."""
    count = steps + 1 + 2 * WARM_UP  # the first chunk; then each bank has its own graph
    cells = latent[:, :, :1].expand(-1, -1, count, -1, -1)
    with torch.inference_mode(), device.stream():
        components = part_components(variant, "vae", DTYPE)
        decoders = [c for c in components if c.name.startswith("vae_decoder")]
        decoder = Decoder(variant.vae, make_sessions(decoders, device, False), device)
        times, pixels = time_each(decoder.decode(cells.to(device.torch_device)))
    return times[1 + WARM_UP :], pixels  # of the first chunk and of both banks' warm-ups


def time_each(work: Iterable[Tensor]) -> tuple[list[float], Tensor]:
    """Milliseconds of each result of a generator after the warm-up, and the last one."""
    marks, result = [], torch.empty(0)
    for latest in work:
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        marks.append(mark)
        result = latest
    on_host = result.cpu()  # waits
    times = [before.elapsed_time(after) for before, after in pairwise(marks)]
    return times[WARM_UP - 1 :], on_host


def make_sessions(components: Sequence[Component], device: CUDADevice, streamed: bool) -> Sessions:
    def load(component: Component, _: Files, given: Tensors, device: Any) -> Any:
        return load_sessions(component, None, given, device)

    found: dict[str, Sequence[Session]] = {}
    for component in components:
        weights = random_weights(component, device)
        if streamed and component.name in STREAMED:
            on_host = {name: tensor.cpu() for name, tensor in weights.items()}
            found[component.name] = stream_sessions(
                component, Files(Path("none")), load, on_host, device
            )
        else:
            found[component.name] = load_sessions(component, None, weights, device)
    return found


def random_weights(component: Component, device: CUDADevice) -> Mapping[str, Tensor]:
    """Of a scale that keeps activations of ordinary size; the same at each call."""
    generator = torch.Generator(device.torch_device).manual_seed(0)
    weights = {}
    for instance in component.instances:
        for name, prepared in instance.items():
            spec = component.weights[name]
            shape = spec.concrete({})
            scale = (shape[-1] if len(shape) == 2 else 1000) ** -0.5
            noise = torch.randn(shape, generator=generator, device=device.torch_device)
            weights[prepared] = (noise * scale).to(spec.dtype)
    return weights


def summary(what: str, times_ms: Sequence[float], same_bits: bool) -> Row:
    return {
        f"{what}_ms": spread(times_ms),
        "same_bits_as_eager": same_bits,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
    }


def show(row: Row) -> None:
    """On stderr: stdout has the line of JSON."""
    print(" | ".join(TABLE.lines([row])[0]), file=sys.stderr)


if __name__ == "__main__":
    main()
