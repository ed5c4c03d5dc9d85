"""Nodes at the sizes of real models, for the tests of plugins, and what they are defined to do."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from wantrt.kernels.aot import ONNX_DTYPES, Operand
from wantrt.kernels.nodes import PLUGINS
from wantrt.models import ops
from wantrt.schedulers.solver import guided_step

WIDTHS = {"1.3B": (1536, 12), "5B": (3072, 24), "14B": (5120, 40)}  # channels, heads
VAE_CHANNELS = {"1.3B": 96, "5B": 256, "14B": 384}
ATTRIBUTES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}  # as an ONNX data type
BATCH, TOKENS, ROWS = 2, 11, 3
PROGRAMS = {  # that a node needs at these sizes
    "QkNormRope": 2 * BATCH * TOKENS,
    "GuideAndStep": 4,
    "RmsSilu": 4 * 32 * 32 // 32,
}

REFERENCES: dict[str, Callable[..., Any]] = {
    "Modulate": ops.modulate,
    "GatedResidual": ops.gated_residual,
    "GatedResidualModulate": ops.gated_residual_modulate,
    "ResidualModulate": partial(ops.gated_residual_modulate, gate=None),
    "GatedResidualNorm": ops.gated_residual_norm,
    "QkNormRope": lambda **values: ops.qk_norm_rope(**values)[:2],
    "Rope": ops.rope,
    "RmsNorm": ops.rms_norm,
    "RmsSilu": ops.rms_silu,
    "GuideAndStep": guided_step,
}

Inputs = dict[str, Operand]
Attributes = dict[str, float | int]


def make_node(name: str, width: str, dtype: torch.dtype) -> tuple[Inputs, Attributes]:
    """Inputs and attributes of a node; what may be of any dtype is of `dtype`."""
    channels, heads = WIDTHS[width]
    vae = VAE_CHANNELS[width]
    rows = ROWS if name.endswith("Rows") else 1
    tokens, modulation = (BATCH, TOKENS, channels), (BATCH, rows, channels)
    latent = (1, 16, 4, 8, 8)
    shapes = {
        **dict.fromkeys(("x", "y"), tokens),
        **dict.fromkeys(("gate", "shift", "scale"), modulation),
        **dict.fromkeys(("weight", "bias", "q_weight", "k_weight"), (channels,)),
        **dict.fromkeys(("cos", "sin"), (TOKENS, channels // heads // 2)),
        **dict.fromkeys(("sample", "x0", "delta", "conditional", "unconditional"), latent),
        "token_row": (TOKENS,),
        "qkv": (BATCH, TOKENS, 3 * channels),
        "guidance_scale": (1,),
        "rows": (50, 4),
        "index": (1,),
        "gamma": (vae,),
    }
    if name == "Rope":
        shapes["x"] = (BATCH, heads, TOKENS, channels // heads)
    if name == "RmsSilu":
        shapes["x"] = (1, vae, 4, 32, 32)
    plugin = PLUGINS[name]
    inputs = {
        key: Operand(shapes[key], dtype if dtype in dtypes else dtypes[0])
        for key, dtypes in plugin.inputs.items()
    }
    attributes = {"eps": 1e-6, "dtype": ATTRIBUTES[dtype], "num_heads": heads}
    return inputs, {key: attributes[key] for key in plugin.attributes}


def make_values(name: str, width: str, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Tensors for the inputs of a node."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: (
            torch.randint(ROWS, each.shape, generator=generator)
            if each.dtype == torch.int64
            else torch.randn(each.shape, generator=generator).to(each.dtype)
        ).to(device)
        for key, each in make_node(name, width, dtype)[0].items()
    }


def reference(name: str, tensors: dict[str, Tensor], node: Attributes) -> tuple[Tensor, ...]:
    """What the node's definition makes of tensors. node: its attributes."""
    values = {**tensors, **node}
    if "dtype" in node:
        values["dtype"] = ONNX_DTYPES[node["dtype"]]
    if f"{name}Rows" in PLUGINS:
        values["token_row"] = None
    result = REFERENCES[name.removesuffix("Rows")](**values)
    return result if isinstance(result, tuple) else (result,)
