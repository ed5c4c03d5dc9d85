"""Every graph in ONNX Runtime against its reference module, at sizes no export has seen."""

from functools import cache

import pytest
import torch

from tests.export.components import NAMES, make_components, make_inputs, make_weights
from wantrt.device import CPUDevice
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.models.ops import TORCH_OPS
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
