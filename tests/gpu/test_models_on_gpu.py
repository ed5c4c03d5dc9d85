"""The reference modules on a GPU against themselves on the CPU, which the oracles check.

Needs torch and pytest alone. Weights are random; sizes are real widths with few layers.
"""

from dataclasses import replace

import pytest
import torch
from torch import nn

from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.config import DIT_1_3B, DIT_14B, VAE_2_1, DiTConfig, TextEncoderConfig
from wantrt.device import CUDADevice
from wantrt.models.dit import DiT, rope_tables, timestep_sinusoid
from wantrt.models.umt5 import TextEncoder
from wantrt.models.vae import VAE

pytestmark = pytest.mark.gpu

SMALL_VAE = replace(VAE_2_1, encoder_dim=32, decoder_dim=32)
TWO_TEXT_LAYERS = TextEncoderConfig(vocab_size=1000, num_layers=2)


@pytest.fixture(autouse=True)
def exact_float32():
    """fp32 must be fp32: convolutions would use TF32 by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def randomise(module: nn.Module) -> None:
    generated = GeneratedTensors(0, "test", module)
    for name, parameter in module.requires_grad_(False).named_parameters():
        parameter.copy_(generated.read(name))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |Δ| over max |expected|."""
    difference = (actual.detach().cpu().float() - expected.float()).abs().max()
    return float(difference / expected.float().abs().max())


def dit_inputs(config: DiTConfig, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, config.in_channels, 3, 16, 26, generator=generator)
    timestep = torch.full((batch, 1), 871.0)
    text_embeds = torch.randn(batch, config.text_len, config.text_dim, generator=generator)
    return latent, timestep, text_embeds


@pytest.mark.parametrize(
    "config, batch", [(DIT_1_3B, 1), (DIT_1_3B, 2), (DIT_14B, 1)], ids=["1.3B", "1.3B x 2", "14B"]
)
def test_dit(config, batch):
    config = replace(config, num_layers=2)
    dit = DiT(config)
    randomise(dit)
    inputs = dit_inputs(config, batch)
    expected = dit(*inputs)
    on_gpu = [tensor.cuda() for tensor in inputs]
    in_bfloat16 = DiT(config, torch.bfloat16).requires_grad_(False)
    in_bfloat16.load_state_dict(dit.state_dict())
    assert relative_error(dit.cuda()(*on_gpu), expected) < 1e-4
    assert relative_error(in_bfloat16.cuda()(*on_gpu), expected) < 2e-2  # 0.003 on a CPU


def test_vae_streams():
    vae = VAE(SMALL_VAE)
    randomise(vae)
    pixels = torch.rand(1, 3, 5, 64, 80) * 2 - 1
    latent, _ = vae.encode(pixels)
    expected, _ = vae.decode(latent)
    vae.cuda()
    assert relative_error(vae.encode(pixels.cuda())[0], latent) < 1e-4
    chunks, caches = [], None
    for cell in latent.cuda().split(1, dim=2):
        chunk, caches = vae.decode(cell, caches)
        chunks.append(chunk)
    assert relative_error(torch.cat(chunks, dim=2), expected) < 1e-4


def test_text_encoder():
    encoder = TextEncoder(TWO_TEXT_LAYERS)
    randomise(encoder)
    tokens = torch.randint(1, 1000, (1, 64))
    mask = torch.arange(64)[None] < 20
    expected = encoder(tokens, mask)
    encoder.cuda()
    assert relative_error(encoder(tokens.cuda(), mask.cuda()), expected) < 1e-4


def test_captured_step_is_the_step():
    """A captured DiT replays to the same bits, and follows what is written into its inputs."""
    config = replace(DIT_1_3B, num_layers=2)
    device = CUDADevice()
    dit = DiT(config, torch.bfloat16)
    randomise(dit)
    dit.to("cuda")
    inputs = [tensor.cuda() for tensor in dit_inputs(config, batch=1)]
    context = dit.condition(inputs[2])
    e6 = dit.time(timestep_sinusoid(inputs[1].flatten(), config.freq_dim))[1][:, None]
    cos, sin = rope_tables(config, *inputs[0].shape[2:], device.torch_device)
    output = torch.empty_like(dit.patch(inputs[0]))

    def step() -> None:
        hidden = dit.patch(inputs[0])
        for block in dit.blocks:
            hidden = block(hidden, e6, None, context, cos, sin)
        output.copy_(hidden)

    torch.cuda.synchronize()
    with device.stream():
        step()
    replay = device.capture(step)
    for seed in (2, 3):
        inputs[0].copy_(torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(seed)))
        torch.cuda.synchronize()
        with device.stream():
            step()
        device.synchronize()
        expected = output.clone()
        output.fill_(torch.nan)
        torch.cuda.synchronize()
        with device.stream():
            replay()
        device.synchronize()
        assert torch.equal(output, expected)
