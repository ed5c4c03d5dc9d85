"""What graphs and residency are worth on a GPU, with torch sessions: nano, and 1.3B at full size.

    python -m wantrt.bench.gpu_runtime [--steps N] [--only nano]

A denoising step is timed eager, captured, and with streamed weights; the decoder's chunk eager and
captured. Weights are generated on the GPU: random, of the real shapes, bfloat16. 1.3B runs at
832x480 with 81 frames: 32,760 tokens, guidance as a batch of two. Times are of CUDA events on the
device's stream after a warm-up; the median with p10 and p90. Beside each stands whether its result
has the bits of the eager one: a speed without that is none. Needs a GPU, torch and numpy alone.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wantrt.bench.report import write_result
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


class Eager(CUDADevice):
    """Captures nothing."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12, help="timed, after two of warm-up")
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    measured: dict[str, Any] = {"dtype": str(DTYPE), "timed_steps": options.steps}
    for name, (size, num_frames) in CASES.items():
        if options.only in (None, name):
            measured[name] = measure(VARIANTS[name], size, num_frames, options.steps)
            show(name, measured[name])
    print(write_result("gpu_runtime", measured))


def measure(variant: Variant, size: Size, num_frames: int, steps: int) -> dict[str, Any]:
    """Milliseconds and parity of steps and chunks, and peak memory."""
    found: dict[str, Any] = {
        "size": size,
        "num_frames": num_frames,
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
        found[f"step_{mode}"] = summary(times, torch.equal(latents[mode], latents["eager"]))
        torch.cuda.empty_cache()
        if mode != "streamed":
            torch.cuda.reset_peak_memory_stats()
            times, chunks[mode] = time_chunks(variant, latents["eager"], steps, device)
            found[f"chunk_{mode}"] = summary(times, torch.equal(chunks[mode], chunks["eager"]))
            torch.cuda.empty_cache()
    return found


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


def summary(times_ms: Sequence[float], same_bits: bool) -> dict[str, Any]:
    p10, median, p90 = np.percentile(times_ms, (10, 50, 90))
    return {
        "median_ms": round(float(median), 3),
        "p10_ms": round(float(p10), 3),
        "p90_ms": round(float(p90), 3),
        "count": len(times_ms),
        "same_bits_as_eager": same_bits,
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
    }


def show(name: str, found: Mapping[str, Any]) -> None:
    size = "x".join(map(str, found["size"]))
    print(f"{name} {size}, {found['num_frames']} frames, {found['tokens']:,} tokens")
    for what, row in found.items():
        if isinstance(row, dict):
            print(
                f"  {what:14} {row['median_ms']:10.2f} ms (p10 {row['p10_ms']:.2f}, p90 "
                f"{row['p90_ms']:.2f}), peak {row['peak_gib']:.2f} GiB, "
                f"{'same bits' if row['same_bits_as_eager'] else 'OTHER BITS'}"
            )


if __name__ == "__main__":
    main()
