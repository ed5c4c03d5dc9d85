"""The floor of a block: formulas against torch's own count and against the tensors of a block."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.bench.counting import bytes_moved
from tests.bench.small_block import CONFIG, LATENT
from wantrt.bench.block_contenders import make_inputs, make_weights, our_block
from wantrt.bench.block_cost import block_cost
from wantrt.bench.kernel_cases import Random
from wantrt.config import DIT_1_3B, DIT_14B
from wantrt.models import ops as reference
from wantrt.models.dit import Block
from wantrt.models.ops import TORCH_OPS, Ops

BETWEEN_PRODUCTS = (
    "modulate",
    "gated_residual",
    "gated_residual_modulate",
    "gated_residual_norm",
    "qk_norm_rope",
    "rms_norm",
)


@pytest.mark.parametrize(
    "config, tokens",
    [(CONFIG, 12), (DIT_1_3B, 32760), (DIT_14B, 32760)],
    ids=["small", "1.3B", "14B"],
)
def test_flops_are_those_torch_counts(config, tokens):
    with torch.device("meta"), torch.inference_mode():
        block = Block(config, torch.bfloat16, TORCH_OPS)
        given = (
            torch.empty(1, tokens, config.dim),
            torch.empty(1, 1, 6, config.dim),
            None,
            torch.empty(1, config.text_len, config.dim, dtype=torch.bfloat16),
            *(torch.empty(tokens, config.head_dim // 2) for _ in range(2)),
        )
        with FlopCounterMode(display=False) as counter:
            block(*given)
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    attention = sum(count for op, count in counted.items() if "attention" in op or "bmm" in op)
    cost = block_cost(config, tokens, config.text_len, torch.bfloat16)
    assert cost.attention_flops == attention
    assert cost.gemm_flops == sum(counted.values()) - attention


def test_flops_of_14b_by_hand():
    """A 40th of the transformer's 1,678 TFLOP a call, patches and head aside."""
    cost = block_cost(DIT_14B, 32760, 512, torch.bfloat16)
    assert 40 * cost.flops / 1e12 == pytest.approx(1678, abs=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bytes_are_those_of_the_tensors_between_the_products(dtype):
    calls = []

    def recorded(name):
        run = getattr(reference, name)

        def call(*arguments):
            calls.append(bytes_moved(run, arguments))
            return run(*arguments)

        return call

    random = Random("cpu", 0)
    weights = make_weights(CONFIG, random)
    given = make_inputs(CONFIG, LATENT, dtype, random)
    our_block(CONFIG, dtype, Ops(**{n: recorded(n) for n in BETWEEN_PRODUCTS}), weights, given)()
    assert block_cost(CONFIG, 12, CONFIG.text_len, dtype).rest_bytes == sum(calls)


def test_floor():
    cost = block_cost(DIT_14B, 32760, 512, torch.bfloat16)
    floor = cost.floor_ms(matrix_rate=8e14, copy_rate=4e12)
    assert floor["gemm"] == pytest.approx(cost.gemm_flops / 8e11, abs=1e-4)
    assert floor["rest"] == pytest.approx(cost.rest_bytes / 4e9, abs=1e-4)
    assert floor["all"] == pytest.approx(
        floor["gemm"] + floor["attention"] + floor["rest"], abs=1e-3
    )
