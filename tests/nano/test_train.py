from dataclasses import replace

import pytest
import torch

from wantrt.checkpoints.opening import open_checkpoint
from wantrt.config import VARIANTS
from wantrt.nano import train_vae
from wantrt.nano.optim import Average, Muon, orthogonalise
from wantrt.nano.train import train_nano


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
