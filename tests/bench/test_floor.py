"""The floor: FLOPs counted from the modules beside the formulas, and the seconds they cost."""

import pytest

from wantrt.bench.floor import Cost, decode_cost, encode_cost, image_cost, step_cost, text_cost
from wantrt.bench.rates import Rates
from wantrt.config import VARIANTS

TERA = 1e12
SIZE_480, SIZE_720 = (832, 480), (1280, 720)


def transformer_flops(name: str, tokens: int) -> tuple[float, float]:
    """Products and attention of one forward by hand: blocks, patches, head and text projection."""
    config = VARIANTS[name].experts[0].dit
    c, f, n, s = config.dim, config.ffn_dim, tokens, config.text_len
    block = 8 * n * c * c + 4 * n * c * f + 4 * n * c * c + 4 * s * c * c
    attention = 4 * n * n * c + 4 * n * s * c
    if config.image_dim:
        rows = VARIANTS[name].image_rows
        block += 4 * rows * c * c
        attention += 4 * n * rows * c
    patches = 2 * n * 4 * (config.in_channels + config.out_channels) * c
    return config.num_layers * block + patches, config.num_layers * attention


@pytest.mark.parametrize(
    "name, size, tokens",
    [
        ("t2v-1.3b", SIZE_480, 32760),
        ("t2v-14b", SIZE_720, 75600),
        ("i2v-14b-480p", SIZE_480, 32760),
        ("t2v-a14b", SIZE_480, 32760),
        ("ti2v-5b", (1280, 704), 18480),
    ],
)
def test_a_step_costs_what_the_formula_says(name, size, tokens):
    variant = VARIANTS[name]
    cost = step_cost(variant, variant.experts[0].name, size, 81, guided=False)
    products, attention = transformer_flops(name, tokens)
    assert cost.matrix_flops == pytest.approx(products, rel=1e-4)
    assert cost.attention_flops == pytest.approx(attention, rel=1e-6)


@pytest.mark.parametrize("size", [(64, 64), SIZE_480], ids=str)
def test_guidance_costs_two_forwards_in_one_batch_or_in_two_runs(size):
    variant = VARIANTS["t2v-1.3b"]
    costs = [step_cost(variant, "transformer", size, 5, guided) for guided in (True, False)]
    assert costs[0].flops == 2 * costs[1].flops


def test_hints_cost_a_second_chain():
    variant = VARIANTS["vace-1.3b"]
    plain = step_cost(VARIANTS["t2v-1.3b"], "transformer", SIZE_480, 81, guided=False)
    hinted = step_cost(variant, "transformer", SIZE_480, 81, guided=False)
    assert hinted.attention_flops == 1.5 * plain.attention_flops  # 15 blocks beside the 30


# Enumerated layer by layer, by hand, from the official modules.
@pytest.mark.parametrize(
    "name, size, frames, tflops",
    [
        ("t2v-1.3b", SIZE_480, 81, 275.4),
        ("t2v-14b", SIZE_720, 81, 639.3),
        ("ti2v-5b", (1280, 704), 121, 2011.4),
    ],
)
def test_decoding_costs_what_its_layers_cost(name, size, frames, tflops):
    cost = decode_cost(VARIANTS[name], size, frames)
    assert cost.flops / TERA == pytest.approx(tflops, rel=0.03)


def test_encoding_costs_by_the_frame():
    variant = VARIANTS["i2v-14b-480p"]
    one, five, nine = (encode_cost(variant, (64, 64), frames).flops for frames in (1, 5, 9))
    assert 0 < one < five
    assert nine - five == five - one


def test_prompts_and_images():
    assert text_cost(VARIANTS["t2v-14b"]).flops / TERA == pytest.approx(4.84, rel=0.01)
    assert text_cost(VARIANTS["t2v-14b"]).weight_bytes == pytest.approx(9.26e9, rel=0.01)
    assert image_cost(VARIANTS["t2v-14b"]) == Cost()
    flf2v, i2v = (image_cost(VARIANTS[name]).flops for name in ("flf2v-14b", "i2v-14b-480p"))
    assert flf2v == 2 * i2v > 0


def test_seconds_are_of_what_takes_longer():
    rates = Rates(matrix=100.0, attention=50.0, copy=10.0)
    assert Cost(200, 100, 1).seconds(rates) == 4.0
    assert Cost(200, 100, 80).seconds(rates) == 8.0
    assert (Cost(1, 2, 3) + Cost(4, 5, 6)) * 2 == Cost(10, 14, 18)
