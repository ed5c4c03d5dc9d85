"""diffusers' pipelines around a small VAE, and our VAE with the same weights."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVACEPipeline, WanVACETransformer3DModel

from tests.models.oracle import Oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory):
    return Oracle(tmp_path_factory.mktemp("oracle"))


@pytest.fixture(scope="session")
def oracle_2_2(tmp_path_factory):
    """With the VAE of Wan 2.2, which TI2V has."""
    return Oracle(tmp_path_factory.mktemp("oracle"), "ti2v-5b")


@pytest.fixture(scope="session")
def encode(oracle):
    return encoder_of(oracle)


@pytest.fixture(scope="session")
def encode_2_2(oracle_2_2):
    return encoder_of(oracle_2_2)


def encoder_of(oracle):
    """What tasks are given: pixels -> normalised latent."""
    vae = oracle.ours.load("vae", torch.float32)

    @torch.inference_mode()
    def run(pixels):
        assert pixels.dtype == torch.float32
        return vae.encode(pixels)[0]

    return run


@pytest.fixture(scope="session")
def theirs(oracle, oracle_2_2):
    vae = oracle.vae()
    nothing = dict.fromkeys(("tokenizer", "text_encoder", "scheduler"))
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=8,
        freq_dim=8,
        ffn_dim=8,
        num_layers=2,
        vace_layers=[0],
    )
    return SimpleNamespace(
        i2v=WanImageToVideoPipeline(vae=vae, **nothing),
        ti2v=WanImageToVideoPipeline(vae=oracle_2_2.vae(), expand_timesteps=True, **nothing),
        vace=WanVACEPipeline(vae=vae, transformer=transformer, **nothing),
    )
