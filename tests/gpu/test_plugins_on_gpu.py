"""Our kernels inside a plan: one stack of blocks, compiled and run by TensorRT itself.

Needs TensorRT for data-centre GPUs, Triton and onnx; skipped where one is missing.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.config import VARIANTS
from wantrt.device import CUDADevice
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component, part_components
from wantrt.session import Tensors

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
BATCH, TOKENS = 2, 300  # no multiple of anything
STATIC, DYNAMIC = (TOKENS, TOKENS, TOKENS), (1, 200, 512)
LARGEST_ERROR = 3e-2  # as engines/measure.py allows between two ways of compiling


def make_stack(variant: str, ops: object) -> Component:
    """One block of the variant's first expert, with weights by their own names."""
    row = VARIANTS[variant]
    components = part_components(row, row.experts[0].name, BF16, 1, ops=ops)
    (stack,) = (component for component in components if component.name == "dit_stack")
    return replace(stack, instances=[{name: name for name in stack.weights}])


def make_inputs(stack: Component) -> Tensors:
    torch.manual_seed(0)
    sizes = {"B": BATCH, "L": TOKENS}
    inputs = {
        name: torch.randn(spec.concrete(sizes), device="cuda").to(spec.dtype)
        for name, spec in stack.inputs.items()
    }
    angles = torch.rand(inputs["cos"].shape, device="cuda") * 6
    return {**inputs, "cos": angles.cos(), "sin": angles.sin()}


@pytest.mark.parametrize(
    "variant, tokens",
    [("nano", DYNAMIC), ("nano", STATIC), ("t2v-1.3b", STATIC), ("t2v-a14b", STATIC)],
    ids=str,
)
def test_a_stack_with_plugins(
    variant: str, tokens: tuple[int, int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reference computes it; and a plan without plugins, compiled after it, too."""
    for module in ("tensorrt", "triton", "onnx"):
        pytest.importorskip(module)
    from wantrt.engines.builder import build_plan
    from wantrt.engines.flavours import find_flavour
    from wantrt.engines.requests import PlanRequest
    from wantrt.engines.session import load_sessions
    from wantrt.export.graph import export_component
    from wantrt.export.ops import ONNX_OPS
    from wantrt.models.ops import TORCH_OPS
    from wantrt.runtime.torch_session import load_sessions as load_torch

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flavour, device = find_flavour("tensorrt"), CUDADevice()
    assert flavour.takes_plugins
    stack = make_stack(variant, ONNX_OPS)
    generated = GeneratedTensors(0, "test", stack.module)
    weights = {
        name: generated.read(name).to("cuda", spec.dtype) for name, spec in stack.weights.items()
    }
    request = PlanRequest(
        component=stack,
        graph=tmp_path / "stack.onnx",
        symbols={"B": (BATCH, BATCH, BATCH), "L": tokens},
        targets=flavour.choose_targets(),
    )
    export_component(stack, request.graph)
    inputs = make_inputs(stack)
    with torch.inference_mode(), device.stream():
        (session,) = load_torch(make_stack(variant, TORCH_OPS), None, weights, device)
        expected = session.run(inputs)["hidden_out"].float()
    for plugins in (True, False):
        plan = tmp_path / f"{plugins}.plan"
        plan.write_bytes(memoryview(build_plan(flavour, replace(request, plugins=plugins))))
        record = PlanRecord(
            file="",
            runtime=flavour.name,
            version=flavour.version,
            targets=request.targets,
            symbols=dict(request.symbols),
            plugins=plugins,
        )
        with torch.inference_mode(), device.stream():
            (session,) = load_sessions(stack, [(record, plan)], weights, device, flavour)
            actual = session.run(inputs)["hidden_out"].float()
            device.synchronize()
        assert float((actual - expected).norm() / expected.norm()) < LARGEST_ERROR
