"""Transformers with an image or a controlling video, against diffusers', with the same weights."""

from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import nn

from tests.models.oracle import relative_error
from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.checkpoints.names import dit_names
from wantrt.config import VARIANTS, DiTConfig
from wantrt.models.components import dit_components, dit_stack_size
from wantrt.models.dit import DiT

SMALL = DiTConfig(
    dim=96, ffn_dim=160, num_heads=4, num_layers=4, text_dim=40, text_len=24, freq_dim=32
)
IMAGE = replace(SMALL, in_channels=36, image_dim=32, text_len=512)  # theirs takes no other
CONFIGS = {
    "i2v": IMAGE,
    "flf2v": replace(IMAGE, image_positions=34),
    "i2v without CLIP": replace(SMALL, in_channels=36),
    "vace": replace(SMALL, vace_layers=(0, 2), vace_channels=96),
    "vace, irregular": replace(SMALL, num_layers=5, vace_layers=(0, 3, 4), vace_channels=96),
}
SIZE = (3, 4, 6)  # frames, height, width of the latent
IMAGE_ROWS = 17


def make_ours(config: DiTConfig) -> DiT:
    with torch.device("meta"):
        dit = DiT(config)
    tensors = GeneratedTensors(0, "transformer", dit)
    weights = {name: tensors.read(name) for name in tensors.specs}
    dit.load_state_dict(weights, assign=True)
    return dit.eval().requires_grad_(False)


def make_theirs(config: DiTConfig, ours: DiT) -> nn.Module:
    arguments = {
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "text_dim": config.text_dim,
        "freq_dim": config.freq_dim,
        "ffn_dim": config.ffn_dim,
        "num_layers": config.num_layers,
        "image_dim": config.image_dim,
        "added_kv_proj_dim": config.dim if config.image_dim else None,
        "pos_embed_seq_len": config.image_positions,
    }
    if config.vace_channels is None:
        theirs = WanTransformer3DModel(**arguments)
    else:
        theirs = WanVACETransformer3DModel(
            **arguments, vace_layers=config.vace_layers, vace_in_channels=config.vace_channels
        )
    names, weights = dit_names(config), {}
    for name, tensor in ours.named_parameters():
        pieces = names.pieces(name, tuple(tensor.shape), "diffusers")
        for piece, part in zip(pieces, tensor.chunk(len(pieces)), strict=True):
            weights[piece.name] = part.reshape(piece.shape)
    theirs.load_state_dict(weights, strict=True)
    return theirs.eval()


def make_inputs(config: DiTConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "latent": draw(2, config.in_channels, *SIZE),
        "text_embeds": draw(2, config.text_len, config.text_dim),
    }
    if config.image_dim:
        rows = config.image_positions or IMAGE_ROWS
        inputs["image_features"] = draw(2, rows, config.image_dim)
    if config.vace_channels:
        inputs["vace_context"] = draw(2, config.vace_channels, *SIZE)
    return inputs


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_matches_diffusers(name):
    config = CONFIGS[name]
    ours = make_ours(config)
    theirs = make_theirs(config, ours)
    inputs = make_inputs(config)
    scale = {"vace_scale": 0.7} if config.vace_channels else {}
    actual = ours(timestep=torch.full((2, 1), 321.0), **inputs, **scale)
    image = inputs.get("image_features")
    if config.image_positions:  # two images, one after the other in the batch
        image = image.unflatten(1, (2, -1)).flatten(0, 1)
    given = {"encoder_hidden_states_image": image}
    if config.vace_channels:
        scales = torch.full((len(config.vace_layers),), 0.7)
        given |= {
            "control_hidden_states": inputs["vace_context"],
            "control_hidden_states_scale": scales,
        }
    expected = theirs(inputs["latent"], torch.tensor([321, 321]), inputs["text_embeds"], **given)
    assert relative_error(actual, expected.sample) <= 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@torch.inference_mode()
def test_its_components_are_the_whole(name):
    """Chained as the denoising loop chains them."""
    config = CONFIGS[name]
    whole = make_ours(config)
    inputs = make_inputs(config)
    timestep = torch.full((2, 1), 321.0)
    expected = whole(timestep=timestep, **inputs, **({"vace_scale": 0.7} if "vace" in name else {}))
    weights = dict(whole.named_parameters())
    parts = {part.name: part for part in dit_components(config, torch.float32, stack=None)}

    def run(part: str, instance: int = 0, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        component = parts[part]
        bound = {own: weights[name] for own, name in component.instances[instance].items()}
        arguments = tuple(tensors[name] for name in component.inputs)
        results = torch.func.functional_call(component.module, bound, arguments)
        return dict(zip(component.outputs, results, strict=True))

    from wantrt.models.dit import rope_tables, timestep_sinusoid

    sinusoid = timestep_sinusoid(timestep.flatten(), config.freq_dim)
    e = run("dit_time", sinusoid=sinusoid)
    cos, sin = rope_tables(config, *SIZE)
    given = {**inputs, "cos": cos, "sin": sin, "e": e["e"][:, None], "e6": e["e6"][:, None]}
    given |= run("dit_condition", **given)
    given |= run("dit_patch", **given)
    if config.vace_channels:
        given |= run("dit_vace_start", **given)
        given |= {"hint_scale": torch.tensor([0.7])}
    stack, hints = dit_stack_size(config, None), 0
    for index in range(len(parts["dit_stack"].instances)):
        if index * stack in config.vace_layers:
            made = run("dit_vace_block", hints, **given)
            given |= {"vace_hidden": made["vace_hidden_out"], "hint": made["hint"]}
            hints += 1
        elif config.vace_channels:
            given["hint"] = torch.zeros_like(given["hint"])
        given["hidden"] = run("dit_stack", index, **given)["hidden_out"]
    assert hints == len(config.vace_layers)
    assert relative_error(run("dit_head", **given)["velocity"], expected) <= 1e-6


@pytest.mark.parametrize(
    "variant, parameters, official, diffusers",
    [
        ("t2v-1.3b", 1_418_996_800, 825, 825),
        ("t2v-14b", 14_288_491_584, 1095, 1095),
        ("i2v-14b-480p", 16_394_878_784, 1303, 1303),
        ("flf2v-14b", 16_395_536_704, 1304, 1304),
        ("vace-1.3b", 2_153_972_032, 1264, 1264),
        ("vace-14b", 17_337_592_896, 1331, 1331),
        ("i2v-a14b", 14_288_901_184, 1095, 1095),
        ("ti2v-5b", 4_999_787_712, 825, 825),
    ],
)
def test_full_size_counts(variant, parameters, official, diffusers):
    """The counts of the released checkpoints."""
    for expert in VARIANTS[variant].experts:
        with torch.device("meta"):
            dit = DiT(expert.dit)
        shapes = {name: tuple(tensor.shape) for name, tensor in dit.named_parameters()}
        assert sum(tensor.numel() for tensor in dit.parameters()) == parameters
        names = dit_names(expert.dit)
        for layout, count in (("official", official), ("diffusers", diffusers)):
            stored = [
                piece.name
                for name, shape in shapes.items()
                for piece in names.pieces(name, shape, layout)
            ]
            assert len(stored) == len(set(stored)) == count


@pytest.mark.parametrize("variant, stack", [("vace-1.3b", 2), ("vace-14b", 5), ("t2v-14b", 10)])
def test_stacks_end_where_hints_enter(variant, stack):
    assert dit_stack_size(VARIANTS[variant].experts[0].dit, None) == stack
