"""Every graph is parsed and built by TensorRT-RTX for real GPUs, on a machine that has none."""

import pytest
import torch

from tests.export.components import NAMES, make_components
from wantrt.config import DIT_14B
from wantrt.export.graph import export_graph
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import dit_components

pytest.importorskip("tensorrt_rtx")

TYPICAL = {"B": 2, "L": 24, "S": 16, "T": 4, "F": 3, "h": 4, "w": 6}
LARGEST = {"B": 2, "L": 512, "S": 512, "T": 50, "F": 21, "h": 32, "w": 32}
# TensorRT-RTX has no float32 matrix product or convolution for Turing, and these are float32 in
# every precision.
NOT_ON_SM75 = ("dit_time", "dit_head", "vae_encoder")


def build(name: str, dtype: torch.dtype, *targets: str) -> bytes:
    from tests.export.engines import build_plan

    component = make_components(dtype, ONNX_OPS)[name]
    return build_plan(component, export_graph(component), targets, TYPICAL, LARGEST)


@pytest.mark.parametrize("name", NAMES)
def test_bf16_builds(name):
    assert len(build(name, torch.bfloat16, "SM89", "SM120")) < 30_000_000


@pytest.mark.parametrize(
    "name", [n for n in NAMES if not n.startswith("text_") and not n.startswith(NOT_ON_SM75)]
)
def test_fp16_builds_for_turing(name):
    build(name, torch.float16, "SM75")


@pytest.mark.parametrize("name", ["vae_encoder_first", "vae_encoder_next", "text_stack"])
def test_fp32_builds(name):
    build(name, torch.float32, "SM89")


def test_a_14b_block_builds_without_its_weights():
    """75,600 tokens, batch 1 and 2, in one plan of a few MB that serves all 40 blocks."""
    from tests.export.engines import build_plan

    (block,) = (
        c
        for c in dit_components(DIT_14B, torch.bfloat16, stack=1, ops=ONNX_OPS)
        if c.name == "dit_stack"
    )
    plan = build_plan(
        block, export_graph(block), ["SM89"], {"B": 1, "L": 75_600}, {"B": 2, "L": 75_600}
    )
    assert len(plan) < 10_000_000
    assert len(block.instances) == 40
