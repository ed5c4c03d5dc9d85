"""The cases of the kernel benchmark: arguments that the ops accept, bytes that they move."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.counting import bytes_moved
from tests.bench.small_cases import small_cases
from wantrt.bench import kernel_cases as cases
from wantrt.bench.kernel_cases import Random, all_cases, float32_arguments, reference
from wantrt.config import VAE_2_1

SMALL = small_cases()


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_bytes_are_those_of_the_tensors(case):
    arguments = case.make(Random("cpu", 0))
    expected = bytes_moved(reference(case.op), arguments)
    if case.op == "guide_and_step":  # reads one of the rows of coefficients
        rows = arguments[6]
        expected -= rows.nbytes - rows[0].nbytes
    assert case.bytes_moved == expected


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_results_come_out_as_a_tuple_of_tensors(case):
    arguments = case.make(Random("cpu", 0))
    outputs = case.outputs(arguments, reference(case.op)(*arguments))
    assert outputs
    assert all(isinstance(output, torch.Tensor) for output in outputs)
    assert all(output.isfinite().all() for output in outputs)


@pytest.mark.parametrize("case", small_cases((torch.bfloat16,)), ids=lambda case: case.name)
def test_reference_in_float32_rounds_nothing(case):
    arguments = case.make(Random("cpu", 0))
    exact = float32_arguments(arguments)
    outputs = case.outputs(exact, reference(case.op)(*exact))
    assert {output.dtype for output in outputs} == {torch.float32}
    for ours, given in zip(exact, arguments, strict=True):
        if isinstance(given, torch.Tensor) and given.is_floating_point():
            assert ours.data_ptr() != given.data_ptr()  # an op in place leaves the original


@pytest.mark.parametrize("op", cases.MODULES)
def test_reference_compiles_as_one_graph(op):
    case = next(case for case in SMALL if case.op == op)
    torch._dynamo.reset()
    traced = torch.compile(reference(case.op), backend="eager", fullgraph=True, dynamic=False)
    arguments, again = (case.make(Random("cpu", 0)) for _ in range(2))
    with torch.inference_mode():
        actual = case.outputs(arguments, traced(*arguments))
        expected = case.outputs(again, reference(case.op)(*again))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_same_seed_same_values():
    case = SMALL[0]
    first, again, other = (case.make(Random("cpu", seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_flops_of_the_linear_layer():
    case = cases.linear_gelu(42, 256, torch.bfloat16)
    with FlopCounterMode(display=False) as counter:
        reference("linear_gelu")(*case.make(Random("cpu", 0)))
    assert case.flops == counter.get_total_flops()


def test_modulation_is_views_of_six_rows():
    _, shift, scale, *_ = cases.modulate(42, 256, torch.bfloat16, rows=2).make(Random("cpu", 0))
    assert shift.stride() == scale.stride() == (2 * 6 * 256, 6 * 256, 1)


def test_two_rows_are_the_first_frame_and_the_rest():
    *_, row, _, _ = cases.modulate(42, 256, torch.bfloat16, rows=2).make(Random("cpu", 0))
    assert row.tolist() == [0] * 2 + [1] * 40


def test_rope_gets_the_view_that_attention_has():
    x, *_ = cases.rope(42, 256, torch.bfloat16).make(Random("cpu", 0))
    assert x.shape == (1, 2, 42, 128)
    assert x.transpose(1, 2).is_contiguous()


def test_shapes_of_the_real_decoder():
    assert cases.decoder_shapes(VAE_2_1, (832, 480)) == [
        (1, 384, 1, 60, 104),
        (1, 192, 2, 120, 208),
        (1, 384, 2, 120, 208),
        (1, 192, 4, 240, 416),
        (1, 96, 4, 480, 832),
    ]


def test_latents_of_480p_and_720p():
    shapes = {case.shape.partition(",")[0] for case in cases.solver_cases()}
    assert shapes == {"1x16x21x60x104", "1x16x21x90x160"}


def test_every_op_is_measured_at_every_size():
    found = list(all_cases([32760, 75600], [5120, 1536, 3072], [torch.bfloat16, torch.float32]))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {case.op for case in found} == set(cases.MODULES)
    token_ops = set(cases.MODULES) - {"rms_silu", "guide_and_step"}
    for tokens in ("32,760", "75,600"):
        for channels in ("5,120", "1,536", "3,072"):
            size = f"{tokens} x {channels}"
            measured = {c.op for c in found if c.name.endswith("bfloat16") and size in c.shape}
            assert measured == token_ops
    in_float32 = {case.op for case in found if case.dtype == torch.float32}
    assert in_float32 == set(cases.MODULES) - {"linear_gelu"}
    assert found[0].name == "modulate, 32,760 x 5,120, bfloat16"  # 14B first


def test_least_bytes_of_a_modulated_14b_stream():
    """By hand: 32,760 tokens of 5120, read as float32, written as bfloat16, and two rows."""
    case = cases.modulate(32760, 5120, torch.bfloat16)
    assert case.bytes_moved == 32760 * 5120 * 6 + 2 * 5120 * 4


def test_reference_of_silu_needs_no_layout():
    case = cases.rms_silu((1, 96, 2, 3, 5), torch.float32, channels_last=True)
    x, gamma = case.make(Random("cpu", 0))
    assert x.is_contiguous(memory_format=torch.channels_last_3d)
    norm = x.norm(dim=1, keepdim=True)
    expected = F.silu(x / norm * 96**0.5 * gamma.view(-1, 1, 1, 1))
    torch.testing.assert_close(reference("rms_silu")(x, gamma), expected)
