"""Which plans are asked for, at the sizes people use."""

import pytest
import torch

from tests.engines.plans import components
from wantrt.config import VARIANTS
from wantrt.engines.requests import (
    PlanRequest,
    Shapes,
    check_tokens,
    has_no_kernels,
    num_tokens,
    plan_shapes,
)
from wantrt.errors import SettingsError
from wantrt.session import TensorSpec

B14 = VARIANTS["t2v-14b"]
SMALL, LARGE = (832, 480), (1280, 720)


def of(component: str, *sizes, frames=(81,), variant=B14, dynamic=False) -> list[Shapes]:
    return plan_shapes(variant, component, sizes, frames, dynamic)


def fixed(**symbols: int) -> dict[str, tuple[int, int, int]]:
    return {name: (size, size, size) for name, size in symbols.items()}


def test_both_guidance_passes_run_at_once_where_the_denoiser_lets_them():
    assert of("dit_stack", SMALL, LARGE) == [
        Shapes("832x480x81 batch 1", fixed(B=1, L=32_760)),
        Shapes("1280x720x81 batch 1", fixed(B=1, L=75_600)),
        Shapes("832x480x81 batch 2", fixed(B=2, L=32_760)),
    ]


def test_a_size_on_its_side_shares_the_stack_and_nothing_else():
    assert len(of("dit_stack", SMALL, SMALL[::-1])) == 2
    assert len(of("dit_patch", SMALL, SMALL[::-1])) == 4
    assert len(of("vae_decoder_next", SMALL, SMALL[::-1])) == 2


def test_sizes_in_patches_and_in_latent_cells():
    assert of("dit_head", LARGE) == [
        Shapes("1280x720x81 batch 1", fixed(B=1, F=21, h=45, w=80)),
    ]
    assert of("vae_decoder_first", LARGE, frames=(81, 49)) == [
        Shapes("1280x720", fixed(h=90, w=160)),
    ]
    ti2v = VARIANTS["ti2v-5b"]  # its VAE makes 16 pixels a cell
    assert of("dit_patch", (1280, 704), frames=(121,), variant=ti2v)[0].symbols == fixed(
        B=1, F=31, h=22, w=40
    )
    assert num_tokens(ti2v, (1280, 704), 121) == 27_280


def test_what_does_not_depend_on_the_size_has_one_plan():
    for name in ("text_embed", "text_stack", "text_head"):
        assert of(name, SMALL, LARGE) == [Shapes("", {"B": (1, 1, 1), "S": (1, 128, 512)})]
    assert of("dit_time", SMALL, LARGE) == [Shapes("", {"T": (1, 50, 1000)})]
    assert of("dit_condition", SMALL, LARGE) == [Shapes("", {"B": (1, 2, 2)})]
    nano = VARIANTS["nano"]
    assert of("text_head", variant=nano)[0].symbols["S"] == (1, 32, 32)


def test_a_range_is_fastest_at_the_first_size():
    assert of("dit_patch", LARGE, SMALL, frames=(81, 49), dynamic=True) == [
        Shapes(
            "1280x720x81 batch 1 … 832x480x49 batch 1",
            {"B": (1, 1, 1), "F": (13, 21, 21), "h": (30, 45, 45), "w": (52, 80, 80)},
        ),
        Shapes(
            "832x480x81 batch 2 … 832x480x49 batch 2",
            {"B": (2, 2, 2), "F": (13, 21, 21), "h": (30, 30, 30), "w": (52, 52, 52)},
        ),
    ]
    assert of("dit_stack", LARGE, dynamic=True) == of("dit_stack", LARGE)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", sorted(components("nano")))
def test_every_symbol_of_a_component_has_a_size(name, dynamic):
    component = components("nano")[name]
    for shapes in of(component.name, (64, 64), frames=(25,), variant=VARIANTS["nano"]):
        sizes = {symbol: high for symbol, (_, _, high) in shapes.symbols.items()}
        for spec in (*component.inputs.values(), *component.outputs.values()):
            assert isinstance(spec, TensorSpec)
            assert all(size > 0 for size in spec.concrete(sizes))


def test_fp16_ends_where_its_numbers_end():
    check_tokens(B14, [SMALL], [81], "fp16")
    check_tokens(B14, [LARGE], [81], "bf16")
    check_tokens(B14, [LARGE], [69], "fp16")  # 64,800 tokens
    with pytest.raises(SettingsError, match=r"1280x720 with 81 frames has 75,600 tokens.*65,504"):
        check_tokens(B14, [SMALL, LARGE], [81], "fp16")


def test_the_table_of_what_has_no_kernels():
    def missing(dtype: torch.dtype, *targets: str) -> set[str]:
        found = components("nano", dtype).values()
        return {component.name for component in found if has_no_kernels(component, targets)}

    encoders = {"vae_encoder_first", "vae_encoder_next"}
    assert missing(torch.bfloat16, "sm89", "sm120") == set()
    assert missing(torch.float16, "sm75") == {"dit_time", "dit_head", *encoders}
    assert missing(torch.float16, "sm89", "sm75") == {"dit_time", "dit_head", *encoders}
    assert missing(torch.float32, "sm89") == {"text_stack"}


def test_a_request_says_all_that_decides_a_plan(tmp_path):
    component = components("nano")["dit_stack"]
    request = PlanRequest(
        component=component, graph=tmp_path, symbols=fixed(B=1, L=8), targets=("sm89",)
    )
    assert not request.baked
    assert not request.tf32
