"""Components to compile, and what it takes to compile one with TensorRT-RTX, which needs no GPU."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from tests.checkpoints.small import make_small
from tests.export.components import make_components, make_weights
from wantrt.config import VARIANTS, Variant
from wantrt.engines.requests import PlanRequest, Shapes, plan_shapes
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import Component, part_components

TARGETS = ("sm89", "sm120")
SIZES = [(64, 64), (128, 96)]
FRAMES = [25, 9]


def variants() -> dict[str, Variant]:
    """nano, and a T2V of other dimensions: two layers a stack, two heads of 24 channels."""
    return {"nano": VARIANTS["nano"], "reduced": make_small().variant}


@cache
def components(variant: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Component]:
    if variant == "nano":
        return make_components(dtype, ONNX_OPS)
    row = variants()[variant]
    parts = ("text_encoder", row.experts[0].name, "vae")
    return {c.name: c for part in parts for c in part_components(row, part, dtype, ops=ONNX_OPS)}


def shapes(variant: str, component: Component, dynamic: bool = False) -> list[Shapes]:
    return plan_shapes(variants()[variant], component.name, SIZES, FRAMES, dynamic)


def make_request(
    component: Component,
    folder: Path,
    symbols: Mapping[str, tuple[int, int, int]],
    targets: tuple[str, ...] = TARGETS,
    baked: bool = False,
) -> PlanRequest:
    """With the graph of `component` written into `folder`."""
    graph = folder / f"{component.name}.onnx"
    export_component(component, graph)
    weights = make_weights(component) if baked else {}
    return PlanRequest(
        component=component,
        graph=graph,
        symbols=symbols,
        targets=targets,
        baked={name: weights[prepared] for name, prepared in component.instances[0].items()}
        if baked
        else {},
    )
