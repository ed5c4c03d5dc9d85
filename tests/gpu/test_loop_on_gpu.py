"""Denoising and decoding on a GPU against the same on the CPU: nano's dimensions, random weights.

The torch runtime from noise to frames, without what a bare machine lacks (tokenizer, media files).
"""

import pytest
import torch
from torch import Tensor

from tests.gpu.nano import EXPERT, NANO, load
from wantrt.device import CPUDevice, CUDADevice, Device
from wantrt.runtime.decoder import Decoder, to_frames
from wantrt.runtime.denoiser import Denoiser, Stage, Transformer
from wantrt.schedulers.grids import make_grid

pytestmark = pytest.mark.gpu

STEPS = 6


def generate(dtype: torch.dtype, device: Device, solver: str = "unipc") -> tuple[Tensor, Tensor]:
    """Latent [1, 16, 3, 8, 8] and frames [9, 64, 64, 3], both on the CPU."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 3, 8, 8, generator=generator)
    rows = (1, EXPERT.dit.text_len, EXPERT.dit.text_dim)
    embeds, negative = (torch.randn(rows, generator=generator) for _ in range(2))
    grid = make_grid(solver, "official", STEPS, NANO.flow_shift)
    with device.stream():
        where = device.torch_device
        transformer = Transformer(EXPERT.dit, load(EXPERT.name, dtype, device))
        stages = [Stage(transformer, range(STEPS), EXPERT.guidance_scale)]
        *_, latent = Denoiser(device).run(
            stages, grid, solver, noise.to(where), embeds.to(where), negative.to(where)
        )
        decoder = Decoder(NANO.vae, load("vae", dtype, device), device)
        frames = torch.cat([to_frames(pixels) for pixels in decoder.decode(latent)])
        return latent.cpu(), frames


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, Tensor]:
    return generate(torch.float32, CPUDevice())


def test_float32_matches_the_cpu(expected, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    latent, frames = generate(torch.float32, CUDADevice())
    scale = expected[0].abs().max()
    torch.testing.assert_close(latent, expected[0], rtol=0, atol=1e-3 * scale)
    assert (frames.int() - expected[1].int()).abs().max() <= 2


def test_bfloat16_stays_near(expected):
    latent, frames = generate(torch.bfloat16, CUDADevice())
    assert torch.nn.functional.cosine_similarity(latent.flatten(), expected[0].flatten(), 0) > 0.999
    assert (frames.float() - expected[1].float()).abs().mean() < 3  # 0.7 on a CPU


def test_same_seed_same_bits():
    first, again = (generate(torch.bfloat16, CUDADevice()) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
