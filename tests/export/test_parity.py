"""Every graph in ONNX Runtime against its reference module, at sizes no export has seen."""

from functools import cache

import pytest
import torch

from tests.export.components import (
    NAMES,
    VAE_SMALL_2_2,
    make_components,
    make_inputs,
    make_weights,
)
from wantrt.config import VAE_NANO
from wantrt.device import CPUDevice
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import vae_components
from wantrt.models.ops import TORCH_OPS
from wantrt.models.vae import VAE
from wantrt.runtime import onnxruntime_session, torch_session

SIZES = {
    "batch 1": {"B": 1, "L": 31, "S": 9, "T": 5, "F": 3, "h": 2, "w": 5},
    "batch 2": {"B": 2, "L": 8, "S": 1, "T": 1, "F": 2, "h": 4, "w": 1},
}


@cache
def components(ops):
    return make_components(torch.float32, ops)


@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name, tmp_path):
    component, reference = components(ONNX_OPS)[name], components(TORCH_OPS)[name]
    path, device = tmp_path / "graph.onnx", CPUDevice()
    export_component(component, path)
    weights = make_weights(component)
    # Instances share a graph and have weights of their own.
    sessions = onnxruntime_session.load_sessions(component, path, weights, device)
    references = torch_session.load_sessions(reference, None, weights, device)
    for symbols in SIZES.values():
        inputs = make_inputs(component, symbols)
        results = []
        for session, reference_session in zip(sessions, references, strict=True):
            outputs = {
                n: torch.full(spec.concrete(symbols), torch.nan)
                for n, spec in component.outputs.items()
            }
            session.run(inputs, outputs)
            for output, expected in reference_session.run(inputs).items():
                scale = expected.abs().max().clamp(min=1e-6)
                assert (outputs[output] - expected).abs().max() / scale < 1e-5, output
            results.append(next(iter(outputs.values())))
        assert not any(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("config", [VAE_NANO, VAE_SMALL_2_2], ids=["2.1", "2.2"])
@torch.inference_mode()
def test_a_stream_of_chunks_gives_the_whole_clip(config, tmp_path):
    """Latent to pixels to latent, by graphs from chunk to chunk and by the module at once."""
    weights, sessions, device = {}, {}, CPUDevice()
    for component in vae_components(config, torch.float32, ONNX_OPS):
        weights |= make_weights(component)
        path = tmp_path / f"{component.name}.onnx"
        export_component(component, path)
        (sessions[component.name],) = onnxruntime_session.load_sessions(
            component, path, weights, device
        )
    with torch.device("meta"):
        vae = VAE(config)
    vae.load_state_dict(weights, assign=True)

    def stream(side, given, wanted, chunks):
        pieces, caches = [], {}
        for chunk in chunks:
            session = sessions[f"vae_{side}_{'next' if pieces else 'first'}"]
            outputs = session.run({given: chunk.contiguous(), **caches})
            pieces.append(outputs[wanted].clone())
            caches = {n[4:]: t.clone() for n, t in outputs.items() if n.startswith("new_")}
        return torch.cat(pieces, dim=2)

    latent = torch.randn(1, config.z_dim, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    pixels, _ = vae.decode(latent)
    actual = stream("decoder", "latent", "pixels", latent.split(1, dim=2))
    assert (actual - pixels).abs().max() < 1e-4
    expected, _ = vae.encode(pixels)
    frames = (pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2))
    actual = stream("encoder", "pixels", "latent", frames)
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()
