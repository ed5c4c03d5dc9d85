"""Counted scratch: against torch's own allocator, and against our kernels."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.variants.small import checkpoint_of
from wantrt.checkpoints import open_checkpoint
from wantrt.config import VARIANTS, Variant
from wantrt.models.components import Component, part_components
from wantrt.models.ops import TORCH_OPS, Ops
from wantrt.runtime.memory import LARGEST_SCRATCH, phases
from wantrt.runtime.scratch import KERNELS, REFERENCE, scratch_bytes
from wantrt.runtime.sizes import dit_symbols, vae_symbols
from wantrt.runtime.torch_session import TorchSession

VIDEO = ((192, 128), 17)
TOLERANCE = 0.1  # attention on a CPU has buffers of its own; all else is the same to the byte
ATTENTION = ("text_stack", "dit_stack", "dit_vace_block")


def components(variant: Variant, ops: Ops, dtype: torch.dtype) -> Iterable[Component]:
    return (c for part in variant.parts for c in part_components(variant, part, dtype, None, ops))


def symbols_of(variant: Variant) -> dict[str, int]:
    """Sizes at which every component can run."""
    return {
        **vae_symbols(variant, VIDEO[0]),
        **dit_symbols(variant, *VIDEO, guided=True),
        "S": 512,
        "T": 50,
    }


def symbols_for(component: Component, variant: Variant) -> dict[str, int]:
    if component.name.startswith("vae_"):
        return vae_symbols(variant, VIDEO[0])
    return symbols_of(variant) | ({} if component.name.startswith("dit_") else {"B": 1})


def allocated_bytes(work: Callable[[], Any]) -> int:
    """The most that torch's allocator had handed out at once, as its profiler tells.

    What a convolution takes and gives back itself does not count: on a CPU that is its input, laid
    out anew for a matrix product, which a GPU's convolutions do without.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True) as run:
        work()
    changes: list[tuple[int, int, tuple[int, int] | None]] = []

    def collect(events: Iterable[Any], convolution: int | None) -> None:
        for event in events:
            kind, fields = event.typed
            if "Allocation" in str(kind):
                inside = None if convolution is None else (convolution, fields.ptr)
                changes.append((event.start_time_ns, fields.alloc_size, inside))
            begins = convolution is None and event.name == "aten::convolution"
            collect(event.children, event.id if begins else convolution)

    collect(run.profiler.kineto_results.experimental_event_tree(), None)
    left: dict[tuple[int, int] | None, int] = {}
    for _, nbytes, inside in changes:
        left[inside] = left.get(inside, 0) + nbytes
    live = peak = 0
    for _, nbytes, inside in sorted(changes):
        if inside is None or left[inside]:
            live += nbytes
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", ["i2v-14b-480p", "vace-1.3b", "ti2v-5b"])
def test_what_torch_allocates(name):
    """Every component of a small model, run for real on the CPU."""
    variant = open_checkpoint(str(checkpoint_of(name, "diffusers"))).variant
    for real, counted in zip(
        components(variant, TORCH_OPS, torch.float32),
        components(variant, REFERENCE, torch.float32),
        strict=True,
    ):
        symbols = symbols_for(real, variant)
        weights = {n: torch.zeros(spec.concrete({})) for n, spec in real.weights.items()}
        inputs = {
            n: torch.zeros(spec.concrete(symbols), dtype=spec.dtype)
            for n, spec in real.inputs.items()
        }
        session = TorchSession(real, weights)
        allocated = allocated_bytes(lambda s=session, i=inputs: s.run(i))
        found = scratch_bytes(counted, symbols)
        if real.name in ATTENTION:
            assert allocated * (1 - TOLERANCE) <= found <= allocated
        else:
            assert found == allocated


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", ["i2v-14b-480p", "vace-1.3b", "ti2v-5b"])
def test_what_our_kernels_allocate(name):
    """Their own declarations for tensors without memory, in the place of what stands for them.

    Attention and the product with GELU are torch's, and differ where there is no GPU.
    """
    from wantrt.kernels.ops import kernel_ops

    kernels = replace(kernel_ops(), attention=KERNELS.attention, linear_gelu=KERNELS.linear_gelu)
    variant = VARIANTS[name]
    for real, counted in zip(
        components(variant, kernels, torch.bfloat16),
        components(variant, KERNELS, torch.bfloat16),
        strict=True,
    ):
        symbols = symbols_for(real, variant)
        assert scratch_bytes(counted, symbols) == scratch_bytes(real, symbols), real.name


def test_views_count_once_and_what_is_gone_no_more():
    class Work(torch.nn.Module):
        def forward(self, x):
            y = x + 1
            z = y[:, :2].flatten() * 2  # y, its part as a copy, and z; then y and z
            del y
            return (z[:1],)

    whole, part = 4 * 100 * 4, 4 * 2 * 4
    specs = next(iter(components(VARIANTS["nano"], REFERENCE, torch.float32)))
    component = replace(specs, module=Work(), inputs={"x": _floats(4, 100)}, outputs={})
    assert scratch_bytes(component, {}) == whole + 2 * part


def _floats(*shape):
    from wantrt.session import TensorSpec

    return TensorSpec(torch.float32, shape)


@pytest.mark.parametrize("name", ["nano", "t2v-1.3b", "vace-14b", "ti2v-5b"])
def test_scratch_is_never_as_much_as_the_quick_check_supposes(name):
    variant = VARIANTS[name]
    for num_frames in (1, variant.num_frames):
        precision = dict.fromkeys(variant.parts, "fp32")
        for phase in phases(variant, precision, variant.size, num_frames, ops=REFERENCE):
            known = phase.caches_bytes + phase.buffers_bytes
            assert phase.scratch_bytes < LARGEST_SCRATCH * known / 2
