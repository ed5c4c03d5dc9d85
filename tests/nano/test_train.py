from dataclasses import replace

import pytest
import torch

from wantrt.checkpoints.opening import open_checkpoint
from wantrt.config import VARIANTS
from wantrt.models.vae import Caches
from wantrt.nano import train_vae
from wantrt.nano.clips import draw_clips, middle_paths
from wantrt.nano.latents import normalise
from wantrt.nano.optim import Average, Muon, orthogonalise
from wantrt.nano.scenes import Scene
from wantrt.nano.train import train_nano
from wantrt.nano.train_i2v import behind_noise, only_first, train_nano_i2v, widened
from wantrt.nano.train_vae import to_signal
from wantrt.tasks import i2v


@pytest.fixture
def small_pool(monkeypatch):
    monkeypatch.setattr(train_vae, "POOL", 8)
    monkeypatch.setattr(train_vae, "BATCH", 1)


def test_the_recipe_runs_through_and_goes_on_where_it_stopped(small_pool, tmp_path):
    steps = {"vae_steps": 1, "decoder_steps": 1, "num_clips": 16}
    train_nano(tmp_path, **steps, dit_steps=1)
    before = (tmp_path / "vae.pt").read_bytes()
    folder = train_nano(tmp_path, **steps, dit_steps=2)
    assert torch.load(tmp_path / "dit.pt", weights_only=True)["step"] == 2
    assert (tmp_path / "vae.pt").read_bytes() == before
    checkpoint = open_checkpoint(folder)
    checkpoint.check()
    found, row = checkpoint.variant, VARIANTS["nano"]  # alike but for the latents' statistics
    assert found.experts == row.experts
    assert found.text_encoder == row.text_encoder
    statistics = {"latents_mean": row.vae.latents_mean, "latents_std": row.vae.latents_std}
    assert replace(found.vae, **statistics) == row.vae
    assert (folder / "tokenizer" / "tokenizer.json").is_file()


def test_the_image_recipe_trains_the_transformer_alone(tmp_path):
    train_nano_i2v(tmp_path, num_clips=16, dit_steps=1)
    folder = train_nano_i2v(tmp_path, num_clips=16, dit_steps=2)
    assert torch.load(tmp_path / "dit.pt", weights_only=True)["step"] == 2
    checkpoint, nano = open_checkpoint(folder), open_checkpoint(variant="nano")
    checkpoint.check()
    assert checkpoint.variant == VARIANTS["nano-i2v"]
    for part in ("vae", "text_encoder", "transformer"):
        before, after = (dict(c.read(part, torch.float32)) for c in (nano, checkpoint))
        same = [torch.equal(before[name], after[name]) for name in before]
        assert all(same) == (part != "transformer")
    assert (folder / "tokenizer" / "tokenizer.json").is_file()


def test_the_widened_transformer_starts_as_nano_and_ignores_the_image():
    nano = open_checkpoint(variant="nano").load("transformer", torch.float32)
    wide = widened(nano, VARIANTS["nano-i2v"].experts[0].dit)
    latent, more = torch.randn(1, 16, 3, 8, 8), torch.randn(1, 20, 3, 8, 8)
    rest = torch.tensor([[500.0]]), torch.randn(1, 32, 96)
    with torch.no_grad():
        torch.testing.assert_close(wide(torch.cat((latent, more), 1), *rest), nano(latent, *rest))


@torch.no_grad()
def test_training_shows_the_image_as_the_pipeline_does():
    vae = open_checkpoint(variant="nano").load("vae", torch.float32)
    image = draw_clips([Scene("red", "star", "up")], 0, num_frames=1, make_paths=middle_paths)[0, 0]
    expected = i2v.condition(image.numpy(), 25, (64, 64), lambda x: vae.encode(x)[0]).channels
    clip = to_signal(image).permute(2, 0, 1)[None, :, None].repeat(1, 1, 25, 1, 1)
    moments = vae.encoder.stream(only_first(clip), Caches(None)).chunk(2, dim=1)[0]
    actual = behind_noise(normalise(moments, VARIANTS["nano-i2v"].vae), 25)
    torch.testing.assert_close(actual.float(), expected, atol=4e-3, rtol=0)  # kept in float16


def test_orthogonalise_brings_singular_values_near_one():
    matrix = torch.randn(48, 160, generator=torch.Generator().manual_seed(0))
    for some in (matrix, matrix.T):
        values = torch.linalg.svdvals(orthogonalise(some))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_muon_descends():
    weight = torch.nn.Parameter(torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0)))
    optimiser = Muon([weight], lr=0.2)
    start = weight.square().sum().item()
    for _ in range(20):
        optimiser.zero_grad()
        weight.square().sum().backward()
        optimiser.step()
    assert weight.square().sum().item() < 0.3 * start


def test_the_average_follows_the_weights():
    layer = torch.nn.Linear(2, 2)
    average = Average(layer, 0.9)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    for step in range(200):
        average.update(layer, step)
    torch.testing.assert_close(average.weights["weight"], layer.weight.detach())
