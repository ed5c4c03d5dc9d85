"""The components: what is exported and run as a unit, cut out of the reference modules.

A component is a module with named inputs and outputs. Its parameters bear the names of the prepared
tensors of its part (text or image encoder, DiT, VAE), so a graph's weight inputs, a session's
bindings and a weight file all speak of the same names. A stack of blocks is one component that runs
several times, each time bound to other blocks: that is what `instances` says.

This is the only list of components; export, every runtime and `wantrt verify` read it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wantrt.config import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, Variant
from wantrt.errors import SettingsError
from wantrt.models.clip import ImageEncoder
from wantrt.models.dit import BlockInputs, DiT, run_blocks
from wantrt.models.ops import TORCH_OPS, Ops
from wantrt.models.umt5 import TextEncoder
from wantrt.models.vae import VAE, CausalConv3d, Decoder, Downsample, Encoder, Stage, Upsample
from wantrt.session import TensorSpec

FLOAT = torch.float32


@dataclass(frozen=True)
class Component:
    """One unit of export and execution.

    `module` lives on the meta device: it says what to compute; weights come from outside. It takes
    the inputs in order and returns the outputs as a tuple in order. `instances` has one map for
    each time the component runs in sequence: parameter of `module` -> prepared tensor.
    """

    name: str
    module: nn.Module
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    instances: Sequence[Mapping[str, str]]

    @property
    def weights(self) -> dict[str, TensorSpec]:
        """Every weight the graph takes as an input, under the name it has in the graph."""
        return {
            name: TensorSpec(tensor.dtype, tuple(tensor.shape))
            for name, tensor in self.module.named_parameters()
        }


def part_components(
    variant: Variant,
    part: str,
    dtype: torch.dtype,
    stack: int | None = None,
    ops: Ops = TORCH_OPS,
) -> list[Component]:
    """All components of a part, one of `variant.parts`."""
    if part == "text_encoder":
        return text_components(variant.text_encoder, dtype, stack, ops)
    if part == "image_encoder":
        assert variant.image_encoder is not None
        return image_components(variant.image_encoder, dtype, ops)
    if part == "vae":
        return vae_components(variant.vae, dtype, ops)
    (dit,) = (expert.dit for expert in variant.experts if expert.name == part)
    return dit_components(dit, dtype, stack, variant.modulation_rows, ops)


def text_components(
    config: TextEncoderConfig, dtype: torch.dtype, stack: int | None = None, ops: Ops = TORCH_OPS
) -> list[Component]:
    """text_embed, text_stack (`stack` layers a run), text_head."""
    with torch.device("meta"):
        encoder = TextEncoder(config, dtype, ops)
    stack = stack_size(config.num_layers, stack, at_most=4)
    hidden = TensorSpec(FLOAT, ("B", "S", config.dim))
    mask = TensorSpec(FLOAT, ("B", "S"))
    return [
        _component(
            "text_embed",
            _TextEmbed(encoder),
            {"tokens": TensorSpec(torch.int64, ("B", "S"))},
            {"hidden": hidden},
        ),
        _component(
            "text_stack",
            _TextStack(encoder, stack),
            {
                "hidden": hidden,
                "position_buckets": TensorSpec(torch.int64, ("S", "S")),
                "mask": mask,
            },
            {"hidden_out": hidden},
            offsets=range(0, config.num_layers, stack),
        ),
        _component(
            "text_head",
            _TextHead(encoder),
            {"hidden": hidden, "mask": mask},
            {"text_embeds": hidden},
        ),
    ]


def image_components(
    config: ImageEncoderConfig, dtype: torch.dtype, ops: Ops = TORCH_OPS
) -> list[Component]:
    """image_encoder."""
    with torch.device("meta"):
        encoder = ImageEncoder(config, dtype, ops)
    return [
        _component(
            "image_encoder",
            _ImageEncoder(encoder),
            {"pixels": TensorSpec(FLOAT, ("B", 3, config.image_size, config.image_size))},
            {"features": TensorSpec(FLOAT, ("B", config.num_tokens, config.dim))},
        )
    ]


def dit_components(
    config: DiTConfig,
    dtype: torch.dtype,
    stack: int | None = None,
    rows: int = 1,
    ops: Ops = TORCH_OPS,
) -> list[Component]:
    """dit_condition, dit_time, dit_patch, dit_stack (`stack` blocks a run), dit_head.

    `rows` is the number of modulation rows; with more than one, the stack and the head also take
    `token_row`, the row of each token. Models with an image have N rows of image features. VACE
    also has dit_vace_start and dit_vace_block; its stacks are cut where a hint enters.
    """
    with torch.device("meta"):
        dit = DiT(config, dtype, ops)
    stack = dit_stack_size(config, stack)
    latent = TensorSpec(FLOAT, ("B", config.in_channels, "F", "2*h", "2*w"))
    velocity = TensorSpec(FLOAT, ("B", config.out_channels, "F", "2*h", "2*w"))
    hidden = TensorSpec(FLOAT, ("B", "L", config.dim))
    patches = TensorSpec(FLOAT, ("B", "F*h*w", config.dim))
    context = TensorSpec(dtype, ("B", config.text_len, config.dim))
    table = TensorSpec(FLOAT, ("L", config.head_dim // 2))
    given = {
        "e6": TensorSpec(FLOAT, ("B", rows, 6, config.dim)),
        "context": context,
        "cos": table,
        "sin": table,
    }
    image_features, image_context, hint = {}, {}, {}
    if config.image_dim is not None:
        image_rows = config.image_positions or "N"  # learned positions fix the number
        image_features["image_features"] = TensorSpec(FLOAT, ("B", image_rows, config.image_dim))
        image_context["image_context"] = TensorSpec(dtype, ("B", image_rows, config.dim))
    if config.vace_channels is not None:
        hint["hint"] = TensorSpec(dtype, ("B", "L", config.dim))
        hint["hint_scale"] = TensorSpec(FLOAT, (1,))
    token_row = {"token_row": TensorSpec(torch.int64, ("L",))} if rows > 1 else {}
    patch_row = {"token_row": TensorSpec(torch.int64, ("F*h*w",))} if rows > 1 else {}
    return [
        _component(
            "dit_condition",
            _DiTCondition(dit),
            {
                "text_embeds": TensorSpec(FLOAT, ("B", config.text_len, config.text_dim)),
                **image_features,
            },
            {"context": context, **image_context},
        ),
        _component(
            "dit_time",
            _DiTTime(dit),
            {"sinusoid": TensorSpec(FLOAT, ("T", config.freq_dim))},
            {
                "e": TensorSpec(FLOAT, ("T", config.dim)),
                "e6": TensorSpec(FLOAT, ("T", 6, config.dim)),
            },
        ),
        _component("dit_patch", _DiTPatch(dit), {"latent": latent}, {"hidden": patches}),
        *_vace_components(config, dit, patches, hidden, given, hint),
        _component(
            "dit_stack",
            _DiTStack(dit, stack, (*given, *token_row, *image_context), tuple(hint)),
            {"hidden": hidden, **given, **token_row, **image_context, **hint},
            {"hidden_out": hidden},
            offsets=range(0, config.num_layers, stack),
        ),
        _component(
            "dit_head",
            _DiTHead(dit),
            {
                "hidden": patches,
                "e": TensorSpec(FLOAT, ("B", rows, config.dim)),
                "latent": latent,
                **patch_row,
            },
            {"velocity": velocity},
        ),
    ]


def _vace_components(
    config: DiTConfig,
    dit: DiT,
    patches: TensorSpec,
    hidden: TensorSpec,
    given: Mapping[str, TensorSpec],
    hint: Mapping[str, TensorSpec],
) -> list[Component]:
    """dit_vace_start and dit_vace_block, one instance a hint; nothing for other models."""
    if config.vace_channels is None:
        return []
    context = TensorSpec(FLOAT, ("B", config.vace_channels, "F", "2*h", "2*w"))
    return [
        _component(
            "dit_vace_start",
            _VaceStart(dit),
            {"vace_context": context, "hidden": patches},
            {"vace_hidden": patches},
        ),
        _component(
            "dit_vace_block",
            _VaceBlock(dit, tuple(given)),
            {"vace_hidden": hidden, **given},
            {"vace_hidden_out": hidden, "hint": hint["hint"]},
            offsets=range(len(config.vace_layers)),
        ),
    ]


def vae_components(config: VAEConfig, dtype: torch.dtype, ops: Ops = TORCH_OPS) -> list[Component]:
    """vae_decoder_first, vae_decoder_next, vae_encoder_first, vae_encoder_next; batch 1.

    The first chunk of a stream takes no caches (they are zero) and leaves them; the next take them
    as ``cache_0`` … and leave ``new_cache_0`` …
    """
    with torch.device("meta"):
        vae = VAE(config, dtype, ops)
    encoder, decoder = vae.encoder, vae.decoder
    cell, frames = config.spatial_stride, config.temporal_stride

    latent = TensorSpec(FLOAT, (1, config.z_dim, 1, "h", "w"))

    def pixels(num_frames: int) -> TensorSpec:
        return TensorSpec(FLOAT, (1, 3, num_frames, multiple_of("h", cell), multiple_of("w", cell)))

    def caches(prefix: str, specs: Sequence[TensorSpec]) -> dict[str, TensorSpec]:
        return {f"{prefix}_{slot}": spec for slot, spec in enumerate(specs)}

    decoder_caches, encoder_caches = _decoder_caches(decoder), _encoder_caches(encoder)
    return [
        _component(
            "vae_decoder_first",
            _VAEDecoder(decoder),
            {"latent": latent},
            {"pixels": pixels(1), **caches("new_cache", decoder_caches)},
        ),
        _component(
            "vae_decoder_next",
            _VAEDecoder(decoder),
            {"latent": latent, **caches("cache", decoder_caches)},
            {"pixels": pixels(frames), **caches("new_cache", decoder_caches)},
        ),
        _component(
            "vae_encoder_first",
            _VAEEncoder(encoder),
            {"pixels": pixels(1)},
            {"latent": latent, **caches("new_cache", encoder_caches)},
        ),
        _component(
            "vae_encoder_next",
            _VAEEncoder(encoder),
            {"pixels": pixels(frames), **caches("cache", encoder_caches)},
            {"latent": latent, **caches("new_cache", encoder_caches)},
        ),
    ]


def _decoder_caches(decoder: Decoder) -> list[TensorSpec]:
    """What a chunk leaves: the last two input frames of every causal convolution, in order.

    Read off the modules: running them on the meta device costs seconds of torch's imports.
    """
    specs: list[TensorSpec] = []
    factor = 1  # height in latent cells
    for layer in (decoder.conv_in, *decoder.middle, *_layers(decoder.up), decoder.conv_out):
        specs += [_cache(conv, 2, factor) for conv in _causal_convs(layer)]
        factor *= 2 if isinstance(layer, Upsample) else 1
    return specs


def _encoder_caches(encoder: Encoder) -> list[TensorSpec]:
    """The same for the encoder; halving time needs one frame."""
    specs: list[TensorSpec] = []
    factor = encoder.config.spatial_stride // encoder.config.patch_size
    for layer in (encoder.conv_in, *_layers(encoder.down), *encoder.middle, encoder.conv_out):
        specs += [_cache(conv, 2, factor) for conv in _causal_convs(layer)]
        if isinstance(layer, Downsample):
            factor //= 2
            specs += [_cache(layer.time_conv, 1, factor)] if layer.time_conv else []
    return specs


def _layers(blocks: nn.ModuleList) -> list[nn.Module]:
    """What changes the resolution, and what lies between, in the order in which it runs."""
    return [
        layer
        for block in blocks
        for layer in (block.layers if isinstance(block, Stage) else (block,))
    ]


def _causal_convs(layer: nn.Module) -> list[CausalConv3d]:
    return [module for module in layer.modules() if isinstance(module, CausalConv3d)]


def _cache(conv: nn.Conv3d, num_frames: int, factor: int) -> TensorSpec:
    height, width = multiple_of("h", factor), multiple_of("w", factor)
    return TensorSpec(conv.weight.dtype, (1, conv.in_channels, num_frames, height, width))


def dit_stack_size(config: DiTConfig, requested: int | None) -> int:
    """Blocks a stack. Of a VACE model each has one hint, which enters behind its first block."""
    if config.vace_channels is None:
        return stack_size(config.num_layers, requested, at_most=10)
    layers = config.vace_layers
    step = layers[1] if len(layers) > 1 else config.num_layers
    if config.num_layers % step or layers != tuple(range(0, config.num_layers, step)):
        step = 1  # hints at irregular places
    if requested not in (None, step):
        raise SettingsError(
            f"--stack {requested}: the stacks of this model end where hints enter, every {step} "
            "blocks. Leave it out."
        )
    return step


def stack_size(num_layers: int, requested: int | None, at_most: int) -> int:
    """Layers a stack: as requested, or the largest divisor of `num_layers` up to `at_most`."""
    divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
    if requested is None:
        return max(n for n in divisors if n <= at_most)
    if requested not in divisors:
        raise SettingsError(
            f"--stack {requested} does not divide {num_layers} layers. "
            f"Take one of {', '.join(map(str, divisors))}."
        )
    return requested


def multiple_of(symbol: str, factor: int) -> str:
    return symbol if factor == 1 else f"{factor}*{symbol}"


def _component(
    name: str,
    module: nn.Module,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    offsets: Sequence[int] = (0,),
) -> Component:
    """A component whose instances start at the given layers."""
    module.eval().requires_grad_(False)
    parameters = [parameter for parameter, _ in module.named_parameters()]
    instances = [{name: _shift(name, offset) for name in parameters} for offset in offsets]
    return Component(name, module, inputs, outputs, instances)


def _shift(name: str, offset: int) -> str:
    """``blocks.2.ffn.up.weight`` shifted by 10 is ``blocks.12.ffn.up.weight``."""
    if offset == 0:
        return name
    container, index, rest = name.split(".", 2)
    return f"{container}.{int(index) + offset}.{rest}"


# -- The modules, each a slice of a part under the part's own parameter names ---------------------


class _TextEmbed(nn.Module):
    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.embed = encoder.embed

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        return (self.embed(tokens),)


class _TextStack(nn.Module):
    def __init__(self, encoder: TextEncoder, stack: int) -> None:
        super().__init__()
        self.layers = encoder.layers[:stack]

    def forward(self, hidden: Tensor, position_buckets: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        for layer in self.layers:
            hidden = layer(hidden, position_buckets, mask)
        return (hidden,)


class _TextHead(nn.Module):
    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.head = encoder.head

    def forward(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (self.head(hidden, mask),)


class _ImageEncoder(nn.Module):
    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.embed, self.blocks = encoder.embed, encoder.blocks

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed(pixels)
        for block in self.blocks:
            hidden = block(hidden)
        return (hidden,)


class _DiTCondition(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.condition = dit.condition

    def forward(
        self, text_embeds: Tensor, image_features: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        context, image_context = self.condition(text_embeds, image_features)
        return (context,) if image_context is None else (context, image_context)


class _DiTTime(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.time = dit.time

    def forward(self, sinusoid: Tensor) -> tuple[Tensor, ...]:
        e, e6 = self.time(sinusoid)
        return e, e6


class _DiTPatch(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.patch = dit.patch

    def forward(self, latent: Tensor) -> tuple[Tensor, ...]:
        return (self.patch(latent),)


class _DiTStack(nn.Module):
    """given: the names of what comes behind the tokens, of `BlockInputs`; hint: then "hint" …"""

    def __init__(
        self, dit: DiT, stack: int, given: tuple[str, ...], hint: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.blocks = dit.blocks[:stack]
        self.given, self.hint = given, hint

    def forward(self, hidden: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = _block_inputs(self.given, tensors)
        hint = dict(zip(self.hint, tensors[len(self.given) :], strict=True))
        return (run_blocks(self.blocks, hidden, given, **hint),)


class _VaceStart(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.vace_start = dit.vace_start

    def forward(self, vace_context: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        return (self.vace_start(vace_context, hidden),)


class _VaceBlock(nn.Module):
    def __init__(self, dit: DiT, given: tuple[str, ...]) -> None:
        super().__init__()
        self.vace_blocks = dit.vace_blocks[:1]
        self.given = given

    def forward(self, vace_hidden: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        vace_hidden, hint = self.vace_blocks[0](vace_hidden, _block_inputs(self.given, tensors))
        return vace_hidden, hint


def _block_inputs(names: tuple[str, ...], tensors: tuple[Tensor, ...]) -> BlockInputs:
    """The first of `tensors`, which have these names."""
    given: dict[str, Any] = dict.fromkeys(BlockInputs._fields)
    given.update(zip(names, tensors, strict=False))
    return BlockInputs(**given)


class _DiTHead(nn.Module):
    def __init__(self, dit: DiT) -> None:
        super().__init__()
        self.head = dit.head

    def forward(
        self, hidden: Tensor, e: Tensor, latent: Tensor, token_row: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        return (self.head(hidden, e, token_row, latent),)


class _VAEDecoder(nn.Module):
    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latent: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        pixels, new = self.decoder(latent, caches or None)
        return (pixels, *new)


class _VAEEncoder(nn.Module):
    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        latent, new = self.encoder(pixels, caches or None)
        return (latent, *new)
