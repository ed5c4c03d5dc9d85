"""Guidance and a solver's step in one pass over the latents, in place.

The coefficients come from a table on the device, by an index on the device: captured once, it
serves every step. Bound by memory: four or five latents read, three written.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from wantrt.kernels.aot import (
    FLOAT32,
    INT64,
    Attributes,
    Launch,
    Operands,
    Plugin,
    ceil_div,
    is_multiple_of_16,
    product,
)
from wantrt.kernels.arguments import (
    FLOATS,
    refuse,
    require,
    require_contiguous,
    require_device,
    require_elements,
    require_one_device,
    require_rank,
)
from wantrt.kernels.rows import LAUNCH
from wantrt.linked import refuse_other_names
from wantrt.schedulers.solver import guide_and_step as guide_and_step_reference

refuse_other_names(__spec__)

__all__ = ["guide_and_step", "guide_and_step_reference"]

BLOCK = 1024  # elements a program, eight a thread of four warps


@triton.jit
def guide_and_step_kernel(
    sample_ptr,
    x0_ptr,
    delta_ptr,
    conditional_ptr,
    unconditional_ptr,
    guidance_scale_ptr,
    rows_ptr,
    index_ptr,
    elements,
    new_sample_ptr,
    new_x0_ptr,
    new_delta_ptr,
    BLOCK: tl.constexpr,
):
    """The new pointers may be the old ones: nothing is written before all is read."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    row = rows_ptr + tl.load(index_ptr).to(tl.int64) * 4
    sigma, stride = tl.load(row), tl.load(row + 1)
    newer, older = tl.load(row + 2), tl.load(row + 3)

    velocity = tl.load(conditional_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if unconditional_ptr is not None:
        base = tl.load(unconditional_ptr + at, mask=inside, other=0.0).to(tl.float32)
        velocity = base + tl.load(guidance_scale_ptr) * (velocity - base)
    sample = tl.load(sample_ptr + at, mask=inside, other=0.0)
    new_x0 = sample - sigma * velocity
    new_delta = new_x0 - tl.load(x0_ptr + at, mask=inside, other=0.0)
    delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
    # the change is summed before it meets the sample: one rounding at the sample's scale
    change = stride * velocity + newer * new_delta + older * delta
    tl.debug_barrier()  # 16-bit velocities are read in wider pieces, so by other threads than write
    tl.store(new_sample_ptr + at, sample + change, mask=inside)
    tl.store(new_x0_ptr + at, new_x0, mask=inside)
    tl.store(new_delta_ptr + at, new_delta, mask=inside)


@torch.library.custom_op("wantrt::guide_and_step", mutates_args=("sample", "x0", "delta"))
def guide_and_step(
    sample: Tensor,
    x0: Tensor,
    delta: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance_scale: Tensor | None,
    rows: Tensor,
    index: Tensor,
) -> None:
    """Same contract as `guide_and_step_reference`; all tensors contiguous.

    index has to lie below N: nothing checks it on the device. Raises ExecutionError for tensors
    that do not fit together.
    """
    op = "guide_and_step"
    require_elements(op, "sample", sample)
    shape, device = tuple(sample.shape), sample.device
    for name, tensor in (("sample", sample), ("x0", x0), ("delta", delta)):
        require(op, name, tensor, shape, device, (torch.float32,))
        require_contiguous(op, name, tensor)
    if (unconditional is None) != (guidance_scale is None):
        refuse(op, "unconditional and guidance_scale belong together: give both or none")
    for name, velocity in (("conditional", conditional), ("unconditional", unconditional)):
        if velocity is not None:
            require(op, name, velocity, shape, device)
            require_contiguous(op, name, velocity)
    if guidance_scale is not None:
        require(op, "guidance_scale", guidance_scale, (1,), device, (torch.float32,))
    require_rank(op, "rows", rows, "N 4")
    require(op, "rows", rows, (rows.shape[0], 4), device, (torch.float32,))
    require_contiguous(op, "rows", rows)
    require(op, "index", index, (1,), device, (torch.int64,))
    require_device(op, sample)
    elements = sample.numel()
    with torch.cuda.device_of(sample):
        guide_and_step_kernel[(triton.cdiv(elements, BLOCK),)](
            sample,
            x0,
            delta,
            conditional,
            unconditional,
            guidance_scale,
            rows,
            index,
            elements,
            sample,
            x0,
            delta,
            BLOCK=BLOCK,
            num_warps=4,
            **LAUNCH,
        )


@guide_and_step.register_fake
def _(
    sample: Tensor,
    x0: Tensor,
    delta: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance_scale: Tensor | None,
    rows: Tensor,
    index: Tensor,
) -> None:
    velocities = conditional, unconditional, guidance_scale
    require_one_device("guide_and_step", sample, x0, delta, *velocities, rows, index)


def _launch(inputs: Operands, node: Attributes) -> Launch:
    elements = product(*inputs["sample"].shape)
    return Launch(
        grid=(ceil_div(elements, BLOCK),),
        constants={"BLOCK": BLOCK},
        scalars={"elements": elements},
        multiples_of_16=("elements",) if is_multiple_of_16(elements) else (),
    )


PLUGINS = (
    Plugin(
        name="GuideAndStep",
        kernel=guide_and_step_kernel,
        inputs={
            "sample": FLOAT32,
            "x0": FLOAT32,
            "delta": FLOAT32,
            "conditional": FLOATS,
            "unconditional": FLOATS,
            "guidance_scale": FLOAT32,
            "rows": FLOAT32,
            "index": INT64,
        },
        outputs=("new_sample", "new_x0", "new_delta"),
        attributes={},
        infer=lambda inputs, node: (inputs["sample"],) * 3,
        launch=_launch,
    ),
)
