"""Writes a checkpoint as a folder in the official or the Diffusers layout.

The inverse of reading: generated weights become the files that other programs (and our own readers,
in tests and benchmarks) open, and trained ones (nano) a checkpoint that diffusers loads. Streams:
one prepared tensor is in memory at a time, whatever the layout.
"""

import json
import mmap
import shutil
from collections.abc import Callable
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wantrt.checkpoints.checkpoint import SHARD_BYTES, Checkpoint, Part
from wantrt.checkpoints.names import Layout
from wantrt.checkpoints.opening import (
    DIFFUSERS_TOKENIZER,
    DIT_STEM,
    OFFICIAL_TOKENIZER,
)
from wantrt.checkpoints.writer import Plan, write_shards
from wantrt.config import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig, Variant
from wantrt.models.clip import IMAGE_MEAN, IMAGE_STD

DIFFUSERS_PIPELINES = {  # task -> class; WanPipeline for others
    "i2v": "WanImageToVideoPipeline",
    "flf2v": "WanImageToVideoPipeline",
    "vace": "WanVACEPipeline",
    "animate": "WanAnimatePipeline",
}

OFFICIAL_TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
OFFICIAL_IMAGE_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"


def write_official(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    pickled: bool = True,
) -> None:
    """Official layout; all but the transformers as ``.pth``, or as safetensors if not `pickled`."""
    variant = checkpoint.variant
    for expert in variant.experts:
        place = folder / expert.folder
        _write_json(place / "config.json", official_dit_config(variant.task, expert.dit))
        part = checkpoint.parts[expert.name]
        _write_part(part, "official", dtype, place / f"{DIT_STEM}.safetensors", shard_bytes)
    files = {
        "vae": variant.vae_file,
        "text_encoder": OFFICIAL_TEXT_FILE,
        **({"image_encoder": OFFICIAL_IMAGE_FILE} if variant.image_encoder else {}),
    }
    for name, file in files.items():
        path, part = folder / file, checkpoint.parts[name]
        if pickled:
            write_pth(path, *_completed(part, "official", dtype))
        else:
            _write_part(part, "official", dtype, path.with_suffix(".safetensors"), 1 << 62)
    _copy_tokenizer(checkpoint, folder / OFFICIAL_TOKENIZER)


def write_diffusers(
    checkpoint: Checkpoint,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Diffusers layout, as ``DiffusionPipeline.from_pretrained`` opens it."""
    variant = checkpoint.variant
    _write_json(folder / "model_index.json", model_index(variant))
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(variant))
    configs = {
        **{e.diffusers_folder: (e.name, diffusers_dit_config(e.dit)) for e in variant.experts},
        "vae": ("vae", diffusers_vae_config(variant.vae)),
        "text_encoder": ("text_encoder", diffusers_text_config(variant.text_encoder)),
    }
    if variant.image_encoder is not None:
        configs["image_encoder"] = (
            "image_encoder",
            diffusers_image_config(variant.image_encoder),
        )
        processor = image_processor_config(variant.image_encoder)
        _write_json(folder / "image_processor" / "preprocessor_config.json", processor)
    for name, (part, config) in configs.items():
        stem = "model" if name in ("text_encoder", "image_encoder") else DIT_STEM
        path = folder / name / f"{stem}.safetensors"
        _write_json(folder / name / "config.json", config)
        _write_part(checkpoint.parts[part], "diffusers", dtype, path, shard_bytes)
    _copy_tokenizer(checkpoint, folder / DIFFUSERS_TOKENIZER)


def unprepared(
    part: Part, layout: Layout, dtype: torch.dtype
) -> tuple[Plan, Callable[[str], list[Tensor]]]:
    """The tensors of a part under the names and shapes of a layout: their plan, and each, flat."""
    places: dict[str, tuple[str, int, int]] = {}  # stored -> piece i of n of what
    plan: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, shape in part.shapes.items():
        pieces = part.names.pieces(name, shape, layout)
        for index, piece in enumerate(pieces):
            plan[piece.name] = (dtype, piece.shape)
            places[piece.name] = (name, index, len(pieces))

    @lru_cache(maxsize=1)  # q, k and v follow one another
    def prepared(name: str) -> Tensor:
        pieces = part.stored(name)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def read(stored: str) -> list[Tensor]:
        name, index, count = places[stored]
        return [prepared(name).chunk(count)[index]]

    return plan, read


def _completed(
    part: Part, layout: Layout, dtype: torch.dtype
) -> tuple[Plan, Callable[[str], list[Tensor]]]:
    """`unprepared`, with zeros for what an image encoder has besides and never computes.

    That is its last block and the norm behind it, which other programs' loaders ask for.
    """
    plan, read = unprepared(part, layout, dtype)
    if not isinstance(part.config, ImageEncoderConfig):
        return plan, read
    dim, last = part.config.dim, part.config.num_layers
    norm = "visual.post_norm" if layout == "official" else "post_layernorm"
    idle: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"{norm}.{name}": (dtype, (dim,)) for name in ("weight", "bias")
    }
    for name, shape in part.shapes.items():
        if name.startswith("blocks.0."):
            its_name = name.replace("blocks.0.", f"blocks.{last}.", 1)
            pieces = part.names.pieces(its_name, shape, layout)
            idle |= {piece.name: (dtype, piece.shape) for piece in pieces}

    def complete(stored: str) -> list[Tensor]:
        return [torch.zeros(prod(idle[stored][1]))] if stored in idle else read(stored)

    return {**plan, **idle}, complete


def write_pth(path: Path, plan: Plan, read: Callable[[str], list[Tensor]]) -> None:
    """A ``torch.save`` file of a dictionary of tensors: first its outline, then each in place."""
    with torch.serialization.skip_data():
        outline = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in plan.items()}
        torch.save(outline, path)  # memory that nobody touches is not taken
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        tensors = torch.load(path, weights_only=True, mmap=True)
    for name, tensor in tensors.items():
        tensor.view(-1).copy_(read(name)[0])


def _write_part(
    part: Part, layout: Layout, dtype: torch.dtype, path: Path, shard_bytes: int
) -> None:
    plan, read = _completed(part, layout, dtype)
    shards = write_shards(path, plan, read, shard_bytes)
    if len(shards) > 1:
        weight_map = {name: file.name for file, shard in shards.items() for name in shard.plan}
        total = sum(shard.nbytes for shard in shards.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(path.with_name(f"{path.name}.index.json"), index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(checkpoint: Checkpoint, path: Path) -> None:
    if checkpoint.tokenizer is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.tokenizer, path)


# -- config.json as each library writes it --------------------------------------------------------


def official_dit_config(task: str, dit: DiTConfig) -> dict[str, Any]:
    vace = {"vace_in_dim": dit.vace_channels, "vace_layers": list(dit.vace_layers)}
    return {
        "_class_name": "VaceWanModel" if dit.vace_channels else "WanModel",
        "model_type": task,
        "dim": dit.dim,
        "eps": dit.eps,
        "ffn_dim": dit.ffn_dim,
        "freq_dim": dit.freq_dim,
        "in_dim": dit.in_channels,
        "num_heads": dit.num_heads,
        "num_layers": dit.num_layers,
        "out_dim": dit.out_channels,
        "text_len": dit.text_len,
        **(vace if dit.vace_channels else {}),
    }


def diffusers_dit_config(dit: DiTConfig) -> dict[str, Any]:
    """`text_len` is ours: said only where it is not the 512 that everybody expects."""
    vace = {"vace_in_channels": dit.vace_channels, "vace_layers": list(dit.vace_layers)}
    return {
        "_class_name": _diffusers_dit_class(dit),
        "added_kv_proj_dim": dit.dim if dit.image_dim else None,
        "attention_head_dim": dit.head_dim,
        "cross_attn_norm": True,
        "eps": dit.eps,
        "ffn_dim": dit.ffn_dim,
        "freq_dim": dit.freq_dim,
        "image_dim": dit.image_dim,
        "in_channels": dit.in_channels,
        "num_attention_heads": dit.num_heads,
        "num_layers": dit.num_layers,
        "out_channels": dit.out_channels,
        "patch_size": list(dit.patch_size),
        "pos_embed_seq_len": dit.image_positions,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": dit.text_dim,
        **({} if dit.text_len == 512 else {"text_len": dit.text_len}),
        **(vace if dit.vace_channels else {}),
    }


def _diffusers_dit_class(dit: DiTConfig) -> str:
    return "WanVACETransformer3DModel" if dit.vace_channels else "WanTransformer3DModel"


def diffusers_vae_config(vae: VAEConfig) -> dict[str, Any]:
    channels = 3 * vae.patch_size**2
    patches = {
        "in_channels": channels,
        "is_residual": vae.residual,
        "out_channels": channels,
        "patch_size": vae.patch_size,
        "scale_factor_spatial": vae.spatial_stride,
    }
    return {
        "_class_name": "AutoencoderKLWan",
        "attn_scales": [],
        "base_dim": vae.encoder_dim,
        "decoder_base_dim": vae.decoder_dim,
        "dim_mult": list(vae.dim_multipliers),
        "dropout": 0.0,
        "latents_mean": list(vae.latents_mean),
        "latents_std": list(vae.latents_std),
        "num_res_blocks": vae.num_res_blocks,
        "temperal_downsample": list(vae.temporal_downsample),  # spelled as diffusers does
        "z_dim": vae.z_dim,
        **(patches if vae.residual or vae.patch_size > 1 else {}),  # which 2.1 does without
    }


def diffusers_text_config(text_encoder: TextEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": text_encoder.ffn_dim,
        "d_kv": text_encoder.head_dim,
        "d_model": text_encoder.dim,
        "dense_act_fn": "gelu_new",
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": text_encoder.eps,
        "model_type": "umt5",
        "num_heads": text_encoder.num_heads,
        "num_layers": text_encoder.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": text_encoder.max_distance,
        "relative_attention_num_buckets": text_encoder.num_buckets,
        "tie_word_embeddings": False,
        "vocab_size": text_encoder.vocab_size,
    }


def diffusers_image_config(image_encoder: ImageEncoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "attention_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_size": image_encoder.dim,
        "image_size": image_encoder.image_size,
        "intermediate_size": image_encoder.ffn_dim,
        "layer_norm_eps": image_encoder.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": image_encoder.num_heads,
        "num_channels": 3,
        "num_hidden_layers": image_encoder.num_layers + 1,  # the last does not run
        "patch_size": image_encoder.patch_size,
        "projection_dim": 1024,
    }


def image_processor_config(image_encoder: ImageEncoderConfig) -> dict[str, Any]:
    """As of laion/CLIP-ViT-H-14: what `wantrt.tasks.clip_image.cover` does."""
    size = image_encoder.image_size
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(IMAGE_STD),
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": size},
    }


def model_index(variant: Variant) -> dict[str, Any]:
    two = len(variant.experts) > 1
    transformer = ["diffusers", _diffusers_dit_class(variant.experts[0].dit)]
    with_image = variant.image_encoder is not None
    image_parts = {
        "image_encoder": ["transformers", "CLIPVisionModel"] if with_image else [None, None],
        "image_processor": ["transformers", "CLIPImageProcessor"] if with_image else [None, None],
    }
    return {
        "_class_name": DIFFUSERS_PIPELINES.get(variant.task, "WanPipeline"),
        "boundary_ratio": variant.boundary_ratios[0] if two else None,
        "expand_timesteps": variant.task == "ti2v",
        **(image_parts if variant.task in ("i2v", "flf2v", "animate") else {}),
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": transformer,
        "transformer_2": transformer if two else [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }


def scheduler_config(variant: Variant) -> dict[str, Any]:
    return {
        "_class_name": "UniPCMultistepScheduler",
        "flow_shift": variant.flow_shift,
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "solver_order": 2,
        "solver_type": "bh2",
        "use_flow_sigmas": True,
    }
