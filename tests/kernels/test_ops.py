"""The models on `kernel_ops` against the same models on the references, and what torch sees."""

import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from torch._decomp import get_decompositions
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.kernels.shared import Random
from wantrt.config import VAE_2_1, VAE_2_2, DiTConfig, TextEncoderConfig
from wantrt.errors import RuntimeUnavailableError
from wantrt.kernels.ops import attention, kernel_ops, linear_gelu
from wantrt.models.dit import Block, DiT, rope_tables
from wantrt.models.ops import TORCH_OPS
from wantrt.models.ops import attention as attention_reference
from wantrt.models.umt5 import TextEncoder
from wantrt.models.vae import VAE

CONFIG = DiTConfig(
    dim=48, ffn_dim=80, num_heads=3, num_layers=2, text_dim=32, text_len=6, freq_dim=32
)
IMAGE_CONFIG = replace(CONFIG, image_dim=20)
VACE_CONFIG = replace(CONFIG, vace_layers=(0,), vace_channels=24)
VAES = pytest.mark.parametrize(
    "vae_config",
    [replace(config, encoder_dim=8, decoder_dim=8) for config in (VAE_2_1, VAE_2_2)],
    ids=["2.1", "2.2"],
)
TEXT_CONFIG = TextEncoderConfig(
    vocab_size=100, dim=32, attention_dim=64, ffn_dim=40, num_heads=4, num_layers=2
)
# what two orders of the same roundings differ by, after a few layers
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(autouse=True)
def exact_convolutions():
    """In TF32, a last bit may become a difference of 2**-11. cuDNN itself stays, as it runs."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def pair(make, device):
    """The model `make(ops)` on the kernels and on the references, with the same weights."""
    torch.manual_seed(0)
    reference = make(TORCH_OPS).requires_grad_(False).to(device)
    for parameter in reference.parameters():
        if parameter.dim() == 1 or not parameter.any():
            parameter.add_(0.2 * torch.randn_like(parameter, device="cpu").to(device))
    model = make(kernel_ops()).requires_grad_(False).to(device)
    model.load_state_dict(reference.state_dict())
    return model, reference


def assert_close(actual, expected, dtype):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[dtype]


def block_inputs(random, rows=None):
    """x, e6, token_row, context, cos, sin for a batch of two."""
    cos, sin = rope_tables(CONFIG, 2, 4, 2, random.device)
    x = random.normal(2, 2 * 2 * 1, CONFIG.dim)
    e6 = random.normal(2, rows or 1, 6, CONFIG.dim)
    return x, e6, random.token_row(rows, x.shape[1]), random.normal(2, 6, CONFIG.dim), cos, sin


@DTYPE
@pytest.mark.parametrize("rows", [None, 2], ids=["per batch", "per token"])
def test_a_block(rows, dtype, kernel_device):
    model, reference = pair(lambda ops: Block(CONFIG, dtype, ops), kernel_device)
    x, e6, token_row, context, cos, sin = block_inputs(Random(kernel_device), rows)
    arguments = x, e6, token_row, context.to(dtype), cos, sin
    assert_close(model(*arguments), reference(*arguments), dtype)


@DTYPE
@pytest.mark.parametrize("rows", [None, 2], ids=["per batch", "per token"])
def test_the_transformer(rows, dtype, kernel_device):
    model, reference = pair(lambda ops: DiT(CONFIG, dtype, ops), kernel_device)
    random = Random(kernel_device)
    latent = random.normal(1, 16, 2, 4, 2)
    timestep = torch.tensor([[500.0, 0.0][: rows or 1]], device=kernel_device)
    arguments = latent, timestep, random.normal(1, 6, 32), random.token_row(rows, 4)
    assert_close(model(*arguments), reference(*arguments), dtype)


def test_a_transformer_that_sees_an_image(kernel_device):
    model, reference = pair(lambda ops: DiT(IMAGE_CONFIG, torch.float32, ops), kernel_device)
    random = Random(kernel_device)
    arguments = random.normal(2, 16, 2, 4, 2), random.normal(2, 1).abs(), random.normal(2, 6, 32)
    features = random.normal(2, 5, 20)
    actual = model(*arguments, image_features=features)
    assert_close(actual, reference(*arguments, image_features=features), torch.float32)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_transformer_with_hints(batch, kernel_device):
    """The gate of a hint is one number for all channels."""
    model, reference = pair(lambda ops: DiT(VACE_CONFIG, torch.float32, ops), kernel_device)
    random = Random(kernel_device)
    latent, text = random.normal(batch, 16, 2, 4, 2), random.normal(batch, 6, 32)
    timestep = torch.full((batch, 1), 500.0, device=kernel_device)
    hints = {"vace_context": random.normal(batch, 24, 2, 4, 2), "vace_scale": 0.7}
    expected = reference(latent, timestep, text, **hints)
    assert_close(model(latent, timestep, text, **hints), expected, torch.float32)


@VAES
def test_the_encoder_by_chunks(vae_config, kernel_device):
    """A first chunk and a next one, for the layouts that streaming makes."""
    model, reference = pair(lambda ops: VAE(vae_config, torch.float32, ops), kernel_device)
    caches, expected_caches = None, None
    for chunk in Random(kernel_device).normal(1, 3, 5, 32, 16).split((1, 4), dim=2):
        actual, caches = model.encode(chunk, caches)
        expected, expected_caches = reference.encode(chunk, expected_caches)
        assert_close(actual, expected, torch.float32)


@DTYPE
@VAES
def test_the_decoder_by_chunks(vae_config, dtype, kernel_device):
    model, reference = pair(lambda ops: VAE(vae_config, dtype, ops), kernel_device)
    latent = Random(kernel_device).normal(1, vae_config.z_dim, 2, 1, 2)
    caches, expected_caches = None, None
    for chunk in latent.split(1, dim=2):
        actual, caches = model.decode(chunk, caches)
        expected, expected_caches = reference.decode(chunk, expected_caches)
        assert_close(actual, expected, dtype)


@DTYPE
def test_the_text_encoder(dtype, kernel_device):
    model, reference = pair(lambda ops: TextEncoder(TEXT_CONFIG, dtype, ops), kernel_device)
    random = Random(kernel_device)
    tokens = random.integers(100, 1, 7)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]], device=kernel_device)
    assert_close(model(tokens, mask), reference(tokens, mask), dtype)


def test_compiles_whole(kernel_device):
    """torch.compile has no break to make at our ops, and knows what they return."""
    model, _ = pair(lambda ops: Block(CONFIG, torch.float32, ops), kernel_device)
    arguments = block_inputs(Random(kernel_device))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), model(*arguments))


def test_exports_as_our_ops():
    """torch.export runs no kernel, and sees each op as one node."""
    block = Block(CONFIG, torch.float32, kernel_ops()).requires_grad_(False)
    program = torch.export.export(block, block_inputs(Random("cpu"), rows=2))
    targets = [str(node.target) for node in program.graph.nodes]
    ours = [target.split(".")[1] for target in targets if target.startswith("wantrt.")]
    assert ours == [
        "modulate",
        "qk_norm_rope",
        "gated_residual_norm",
        *("rms_norm", "rms_norm"),
        "gated_residual_modulate",
        "gated_residual",
    ]


def test_gelu_is_part_of_a_16_bit_product_on_cuda():
    """Asked of tensors without data: torch says itself which GELU it computes there."""
    with FakeTensorMode():
        for dtype, fused in ((torch.bfloat16, True), (torch.float16, True), (torch.float32, False)):
            shapes = (2, 3, 8), (16, 8), (16,)
            arguments = [torch.empty(shape, device="cuda", dtype=dtype) for shape in shapes]
            assert linear_gelu(*arguments).shape == (2, 3, 16)
            code = make_fx(linear_gelu)(*arguments).code
            assert ("_addmm_activation" in code) == fused
            table = get_decompositions([torch.ops.aten._addmm_activation])
            code = make_fx(linear_gelu, table)(*arguments).code
            assert "approximate = 'tanh'" in code


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 32), (5, 32)], ids=str)
def test_linear_gelu(shape, dtype, kernel_device):
    random = Random(kernel_device)
    arguments = random.normal(*shape), random.normal(48, 32) / 6, random.normal(48)
    exact = TORCH_OPS.linear_gelu(*arguments)
    actual = kernel_ops().linear_gelu(*(tensor.to(dtype) for tensor in arguments))
    assert actual.dtype == dtype
    # erf instead of tanh would be off by up to 5e-4 everywhere; that is for the test above
    torch.testing.assert_close(actual.float(), exact, rtol=5e-2, atol=5e-2)


def test_attention_keeps_its_preferences_to_itself(kernel_device):
    random = Random(kernel_device)
    q, k, v = (random.normal(1, 2, tokens, 16) for tokens in (7, 5, 5))
    before = torch._C._get_sdp_priority_order(), torch.backends.cuda.cudnn_sdp_enabled()
    for bias in (None, random.normal(1, 2, 7, 5)):
        expected = attention_reference(q, k, v, bias, 0.3)
        torch.testing.assert_close(attention(q, k, v, bias, 0.3), expected, rtol=1e-3, atol=1e-3)
    after = torch._C._get_sdp_priority_order(), torch.backends.cuda.cudnn_sdp_enabled()
    assert before == after


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    kernel_ops.cache_clear()
    with pytest.raises(RuntimeUnavailableError, match="pip install triton"):
        kernel_ops()
