"""What a component allocates on a GPU, beside what was counted without one, at real sizes.

Weights and inputs are zeros: memory does not depend on values.
"""

import gc

import pytest
import torch

from wantrt.config import VARIANTS
from wantrt.device import CUDADevice
from wantrt.models.components import part_components
from wantrt.runtime.fused import ops_for
from wantrt.runtime.scratch import KERNELS, scratch_bytes
from wantrt.runtime.sizes import dit_symbols, vae_symbols
from wantrt.runtime.torch_session import TorchSession

pytestmark = pytest.mark.gpu

TOLERANCE = 0.1
LIBRARIES_BYTES = 2**26  # that cuBLAS and cuDNN keep from their first call on
BLOCKS = 2  # a run: the first of a stack and one that follows another

CASES = [
    *(("t2v-1.3b", name) for name in ("dit_patch", "dit_stack", "dit_head")),
    *(("t2v-1.3b", f"vae_decoder_{chunk}") for chunk in ("first", "next")),
    *(("t2v-1.3b", f"vae_encoder_{chunk}") for chunk in ("first", "next")),
    *(("ti2v-5b", name) for name in ("dit_stack", "vae_decoder_next")),
    ("vace-1.3b", "dit_vace_block"),
]


def make(variant, component, ops):
    row = VARIANTS[variant]
    if component.startswith("vae_"):
        made = part_components(row, "vae", torch.bfloat16, None, ops)
    else:
        stack = BLOCKS if component == "dit_stack" else None
        made = part_components(row, row.experts[0].name, torch.bfloat16, stack, ops)
    return next(each for each in made if each.name == component)


@pytest.mark.parametrize("variant, component", CASES)
def test_scratch_of_a_component(variant, component):
    device, row = CUDADevice(), VARIANTS[variant]
    real = make(variant, component, ops_for(device.torch_device))
    symbols = dict(vae_symbols(row, row.size))
    if component.startswith("dit_"):
        symbols = dit_symbols(row, row.size, row.num_frames, guided=True)
    counted = scratch_bytes(make(variant, component, KERNELS), symbols)

    def zeros(specs):
        return {
            name: torch.zeros(spec.concrete(symbols), dtype=spec.dtype, device=device.torch_device)
            for name, spec in specs.items()
        }

    session, inputs = TorchSession(real, zeros(real.weights)), zeros(real.inputs)
    with device.stream():
        session.run(inputs)  # kernels are compiled, libraries take their workspaces
        device.synchronize()
        gc.collect()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        session.run(inputs)
        device.synchronize()
    allocated = torch.cuda.max_memory_allocated() - before
    print(f"{variant} {component}: {allocated / 2**20:.0f} MiB, counted {counted / 2**20:.0f} MiB")
    assert counted == pytest.approx(allocated, rel=TOLERANCE, abs=LIBRARIES_BYTES)
