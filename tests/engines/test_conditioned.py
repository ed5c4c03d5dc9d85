"""What models with images and hints add, compiled by TensorRT-RTX for the sizes of their videos."""

import pytest
import torch

from tests.engines.plans import make_request
from wantrt.checkpoints import open_checkpoint
from wantrt.engines.requests import plan_shapes
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import part_components

pytest.importorskip("tensorrt_rtx")

from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import find_flavour

SMALL = "random:0:dim=48,ffn_dim=80,num_heads=2,num_layers=3"
SMALL_IMAGE = (
    f"{SMALL},image_encoder.dim=160,image_encoder.num_heads=2,image_encoder.ffn_dim=96,"
    "image_encoder.num_layers=2,image_encoder.image_size=42"
)
NEW = {
    "i2v-14b-480p": (SMALL_IMAGE, ("image_encoder", "dit_condition", "dit_stack")),
    "flf2v-14b": (SMALL_IMAGE, ("image_encoder", "dit_condition", "dit_stack")),
    "vace-1.3b": (SMALL, ("dit_vace_start", "dit_vace_block", "dit_stack")),
    "ti2v-5b": (SMALL, ("dit_stack", "dit_head")),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name, component", [(n, c) for n, (_, cs) in NEW.items() for c in cs])
def test_builds(tmp_path, name, component, dynamic):
    row = open_checkpoint(NEW[name][0], name).variant
    parts = [part for part in row.parts if part not in ("text_encoder", "vae")]
    found = {
        c.name: c
        for part in parts
        for c in part_components(row, part, torch.bfloat16, ops=ONNX_OPS)
    }
    sizes = [(128, 64), (64, 192)]
    *_, shapes = plan_shapes(row, component, sizes, [9, 25], dynamic)
    request = make_request(found[component], tmp_path, shapes.symbols, ("sm89",))
    plan = build_plan(find_flavour("tensorrt-rtx"), request)
    assert 50_000 < plan.nbytes < 20_000_000
