"""Our ONNX Runtime sessions beside diffusers' modules: same weights, inputs and CPU, one run.

    python -m wantrt.bench.compare_diffusers [--blocks 2] [--repeats 5] [--threads N]

Measured are one call of a transformer of 1.3B width (a few blocks, 1,950 tokens: 416x240, 17
frames; time embedding, text projection, patches and head included on both sides) and the VAE
decoder at 416x240 (5 frames from 2 latent frames). Both are float32 with the same number of
threads. Diffusers runs in eager mode with torch's scaled_dot_product_attention, as it does on a
CPU. Rounds alternate, so that what else the machine does meets both. A speed counts only with its
parity: the largest difference, relative to the output's largest value, is printed beside it.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wantrt.bench.report import machine, write_result
from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.checkpoints.layouts import write_diffusers
from wantrt.device import CPUDevice
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.linked import refuse_other_names
from wantrt.models.components import part_components
from wantrt.models.dit import rope_tables, timestep_sinusoid
from wantrt.runtime.decoder import Decoder
from wantrt.runtime.onnxruntime_session import load_sessions
from wantrt.session import Session

refuse_other_names(__spec__)

WIDTH, HEIGHT = 416, 240
DIT_LATENT_FRAMES, VAE_LATENT_FRAMES = 5, 2
# The text encoder takes no part; its width is the width of the text features.
SMALL_TEXT = (
    "text_encoder.vocab_size=64,text_encoder.attention_dim=64,text_encoder.ffn_dim=64,"
    "text_encoder.num_heads=1,text_encoder.num_layers=1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=2, help="transformer blocks (1.3B has 30)")
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds, after one to warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for both sides")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    generated = open_checkpoint(f"random:0:num_layers={arguments.blocks},{SMALL_TEXT}", "t2v-1.3b")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        write_diffusers(generated, Path(folder), torch.float32)
        checkpoint = open_checkpoint(folder)
        rows = {
            "transformer": compare(
                diffusers_transformer(Path(folder)),
                our_transformer(checkpoint, Path(folder), arguments.threads),
                transformer_inputs(checkpoint),
                arguments.repeats,
            ),
            "VAE decoder": compare(
                diffusers_decoder(Path(folder)),
                our_decoder(checkpoint, Path(folder), arguments.threads),
                (torch.randn(1, 16, VAE_LATENT_FRAMES, HEIGHT // 8, WIDTH // 8),),
                arguments.repeats,
            ),
        }
    print_table(rows)
    path = write_result("compare_diffusers", {"settings": vars(arguments), "results": rows})
    print(path)


def compare(
    theirs: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    repeats: int,
) -> dict[str, Any]:
    """Median, fastest and slowest seconds of both, alternating; their ratio and difference."""
    expected, actual = theirs(*inputs), ours(*inputs)  # the warm-up
    seconds: dict[str, list[float]] = {"diffusers": [], "wantrt": []}
    for _ in range(repeats):
        for name, run in (("diffusers", theirs), ("wantrt", ours)):
            start = time.perf_counter()
            run(*inputs)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "parity": float((actual - expected).abs().max() / expected.abs().max()),
        "ratio": round(medians["diffusers"] / medians["wantrt"], 2),
    } | {
        f"{name}_s": {
            "median": round(medians[name], 3),
            "min": round(min(times), 3),
            "max": round(max(times), 3),
        }
        for name, times in seconds.items()
    }


def transformer_inputs(checkpoint: Checkpoint) -> tuple[Tensor, Tensor, Tensor]:
    """Latent, timestep [1], text features; 60 rows of text and the padding's zeros."""
    config = checkpoint.variant.experts[0].dit
    latent = torch.randn(1, config.in_channels, DIT_LATENT_FRAMES, HEIGHT // 8, WIDTH // 8)
    text = torch.randn(1, config.text_len, config.text_dim)
    text[:, 60:] = 0
    return latent, torch.tensor([700.0]), text


def diffusers_transformer(folder: Path) -> Callable[..., Tensor]:
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel.from_pretrained(folder / "transformer").eval()
    return lambda latent, timestep, text: model(latent, timestep, text, return_dict=False)[0]


def diffusers_decoder(folder: Path) -> Callable[..., Tensor]:
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(folder / "vae").eval()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return lambda latent: vae.decode(latent * std + mean, return_dict=False)[0]


def our_sessions(
    checkpoint: Checkpoint, part: str, folder: Path, threads: int
) -> Mapping[str, Sequence[Session]]:
    weights = dict(checkpoint.read(part, torch.float32))
    sessions = {}
    for component in part_components(checkpoint.variant, part, torch.float32, ops=ONNX_OPS):
        graph = folder / f"{component.name}.onnx"
        export_component(component, graph)
        sessions[component.name] = load_sessions(component, graph, weights, CPUDevice(), threads)
    return sessions


def our_transformer(checkpoint: Checkpoint, folder: Path, threads: int) -> Callable[..., Tensor]:
    config = checkpoint.variant.experts[0].dit
    sessions = our_sessions(checkpoint, "transformer", folder, threads)

    def run(latent: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        cos, sin = rope_tables(config, *latent.shape[2:])
        sinusoid = timestep_sinusoid(timestep, config.freq_dim)
        time_rows = sessions["dit_time"][0].run({"sinusoid": sinusoid})
        context = sessions["dit_condition"][0].run({"text_embeds": text})
        hidden = sessions["dit_patch"][0].run({"latent": latent})["hidden"]
        for stack in sessions["dit_stack"]:
            inputs = {"hidden": hidden, "e6": time_rows["e6"][None], "cos": cos, "sin": sin}
            hidden = stack.run({**inputs, **context})["hidden_out"]
        head = {"hidden": hidden, "e": time_rows["e"][None], "latent": latent}
        return sessions["dit_head"][0].run(head)["velocity"]

    return run


def our_decoder(checkpoint: Checkpoint, folder: Path, threads: int) -> Callable[..., Tensor]:
    sessions = our_sessions(checkpoint, "vae", folder, threads)
    decoder = Decoder(checkpoint.variant.vae, sessions, CPUDevice())
    return lambda latent: torch.cat([chunk.clone() for chunk in decoder.decode(latent)], dim=2)


def print_table(rows: Mapping[str, Mapping[str, Any]]) -> None:
    card = machine()
    versions = ", ".join(
        f"{n} {card['versions'][n]}" for n in ("diffusers", "torch", "onnxruntime")
    )
    table = Table(title=f"{card['cpu']}, {card['threads']} threads; {versions}")
    for column in ("float32", "diffusers s", "wantrt s", "ratio", "max |Δ| / scale"):
        table.add_column(column, justify="left" if column == "float32" else "right")
    for name, row in rows.items():
        medians = (f"{row[side]['median']:.2f}" for side in ("diffusers_s", "wantrt_s"))
        table.add_row(name, *medians, f"{row['ratio']:.2f}x", f"{row['parity']:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()
