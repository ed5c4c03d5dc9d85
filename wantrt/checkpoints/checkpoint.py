"""A checkpoint: its variant, and its weights as prepared tensors, part by part.

Parts are the text encoder, the image encoder where a variant has one, one DiT an expert, and the
VAE. The parameters of a part's module, built on the meta device, are the list of its prepared
tensors: names, shapes and dtypes. Everything streams: one tensor is in memory at a time, and a
file's bytes stay in the page cache.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wantrt.checkpoints.names import (
    IGNORED_NAMES,
    TIED_NAMES,
    Layout,
    NameMap,
    Piece,
    dit_names,
    image_names,
    text_names,
    vae_names,
)
from wantrt.checkpoints.tensors import StoredTensors
from wantrt.checkpoints.writer import Plan, Progress, write_shards
from wantrt.config import (
    DiTConfig,
    Expert,
    ImageEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
    Variant,
)
from wantrt.errors import CheckpointError, SettingsError
from wantrt.models.clip import ImageEncoder
from wantrt.models.dit import DiT
from wantrt.models.umt5 import TextEncoder
from wantrt.models.vae import VAE

PartConfig = DiTConfig | VAEConfig | TextEncoderConfig | ImageEncoderConfig

SHARD_BYTES = 4 << 30
SAMPLE = 256  # values of a tensor's start, middle and end that go into the fingerprint
LISTED = 50  # names of one kind that an error lists


@dataclass(frozen=True)
class Part:
    """One module's weights: what they are (config), where they are (tensors) and how named.

    `origin` is what generated weights follow from.
    """

    name: str
    config: PartConfig
    tensors: StoredTensors
    layout: Layout
    origin: str | None = None

    def module(self, dtype: torch.dtype) -> nn.Module:
        """The reference module on the meta device."""
        return meta_module(self.config, dtype)

    @cached_property
    def names(self) -> NameMap:
        return name_map(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The prepared tensors."""
        parameters = self.module(torch.float32).named_parameters()
        return {name: tuple(parameter.shape) for name, parameter in parameters}

    def pieces(self, name: str) -> list[Piece]:
        """Where a prepared tensor is stored, from top to bottom."""
        return [
            replace(piece, name=TIED_NAMES[piece.name])
            if piece.name in TIED_NAMES
            and piece.name not in self.tensors.specs
            and TIED_NAMES[piece.name] in self.tensors.specs
            else piece
            for piece in self.names.pieces(name, self.shapes[name], self.layout)
        ]

    def stored(self, name: str) -> list[Tensor]:
        """The pieces of a prepared tensor, each flat, in the dtype of the file.

        They are as many in every layout: what one stores whole and another in three comes in three.
        """
        flat = [self.tensors.read(piece.name).reshape(-1) for piece in self.pieces(name)]
        if self.layout == "prepared" or len(flat) > 1:
            return flat
        return list(flat[0].chunk(self.names.finest(name)))

    @cached_property
    def fingerprint(self) -> str:
        """A hash of dimensions, stored dtypes and a sample of every tensor: not of its layout.

        Any real change (training, merging, quantising) shows in it; a change of a few values that
        somebody places on purpose need not.
        """
        digest = hashlib.sha256(repr(self.config).encode())
        if self.origin is not None:
            digest.update(self.origin.encode())
            return digest.hexdigest()
        for name in self.shapes:
            digest.update(name.encode())
            for flat in self.stored(name):
                middle = flat.numel() // 2
                digest.update(str(flat.dtype).encode())
                for start in (0, middle, max(0, flat.numel() - SAMPLE)):
                    values = flat[start : start + SAMPLE].contiguous()
                    digest.update(values.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def problems(self) -> list[str]:
        """What is missing, misshapen, unexpected or no weight at all; from headers alone."""
        found = dict(self.tensors.specs)
        missing, wrong = [], []
        for name in self.shapes:
            for piece in self.pieces(name):
                stored = found.pop(piece.name, None)
                if stored is None:
                    missing.append(piece.name)
                elif stored.shape != piece.shape:
                    wrong.append(f"{piece.name} is {stored.shape}, expected {piece.shape}")
                elif not stored.dtype.is_floating_point:
                    wrong.append(f"{piece.name} is {stored.dtype}, expected floating point")
        ignored = (*IGNORED_NAMES, *self.names.ignored)
        unexpected = [n for n in found if not any(p.fullmatch(n) for p in ignored)]
        kinds = {"missing": missing, "misshapen": wrong, "unexpected": unexpected}
        return [f"{self.name}: {_listed(kind, names)}" for kind, names in kinds.items() if names]


def _listed(kind: str, names: list[str]) -> str:
    more = f"\n  … and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {kind}\n  " + "\n  ".join(names[:LISTED]) + more


def meta_module(config: PartConfig, dtype: torch.dtype) -> nn.Module:
    """The reference module of a part, without memory."""
    with torch.device("meta"):
        match config:
            case DiTConfig():
                return DiT(config, dtype)
            case VAEConfig():
                return VAE(config, dtype)
            case TextEncoderConfig():
                return TextEncoder(config, dtype)
            case ImageEncoderConfig():
                return ImageEncoder(config, dtype)


def name_map(config: PartConfig) -> NameMap:
    match config:
        case DiTConfig():
            return dit_names(config)
        case VAEConfig():
            return vae_names(config)
        case TextEncoderConfig():
            return text_names(config)
        case ImageEncoderConfig():
            return image_names(config)


def part_configs(variant: Variant) -> dict[str, PartConfig]:
    """The parts of a variant by name, in the order in which they run."""
    dits = {expert.name: expert.dit for expert in variant.experts}
    images = {"image_encoder": variant.image_encoder} if variant.image_encoder else {}
    return {"text_encoder": variant.text_encoder, **images, **dits, "vae": variant.vae}


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint. Nothing is read but headers until its weights are asked for.

    `settings` is what a Diffusers repository records: ``scheduler_config`` and ``model_index`` as
    they are. `notes` are sentences for the user: what was ambiguous and how it was taken.
    """

    variant: Variant
    layout: str | None  # of its files; None: generated
    parts: Mapping[str, Part]
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: Path | None = None
    notes: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise one CheckpointError that lists every tensor that does not fit, in every part."""
        problems = [problem for part in self.parts.values() for problem in part.problems()]
        problems += self._misfits()
        if problems:
            raise CheckpointError(
                f"{self.source} does not fit {self.variant.title} ({self.layout} layout).\n"
                + "\n".join(problems)
                + "\nExpected exactly the tensors of the model. Is a file from another checkpoint?"
            )

    def _misfits(self) -> Iterator[str]:
        """Parts that do not fit each other."""
        for expert in self.variant.experts:
            if expert.dit.text_dim != self.variant.text_encoder.dim:
                yield (
                    f"{expert.name} takes text features of {expert.dit.text_dim} channels, "
                    f"the text encoder gives {self.variant.text_encoder.dim}"
                )
            if self.variant.image_encoder is not None:
                yield from self._image_misfits(expert, self.variant.image_encoder)
            if expert.dit.out_channels != self.variant.vae.z_dim:
                yield (
                    f"{expert.name} makes latents of {expert.dit.out_channels} channels, "
                    f"the VAE takes {self.variant.vae.z_dim}"
                )
            if self.variant.task == "t2v" and expert.dit.in_channels != expert.dit.out_channels:
                yield (
                    f"{expert.name} takes {expert.dit.in_channels} channels and makes "
                    f"{expert.dit.out_channels}: not text to video"
                )

    def _image_misfits(self, expert: Expert, encoder: ImageEncoderConfig) -> Iterator[str]:
        if expert.dit.image_dim != encoder.dim:
            yield (
                f"{expert.name} takes image features of {expert.dit.image_dim} channels, "
                f"the image encoder gives {encoder.dim}"
            )
        if expert.dit.image_positions not in (None, self.variant.image_rows):
            yield (
                f"{expert.name} has positions for {expert.dit.image_positions} rows of image "
                f"features, the image encoder gives {self.variant.image_rows}"
            )

    @cached_property
    def fingerprint(self) -> str:
        """Of all parts by name: which weights these are, whatever is done with them."""
        named = [(name, part.fingerprint) for name, part in self.parts.items()]
        return hashlib.sha256(repr(named).encode()).hexdigest()

    def read(self, part: str, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The prepared tensors of a part, one at a time, in the order of the module's parameters.

        A tensor that is stored as it is prepared comes as a view of the mapped file.
        """
        source = self._part(part)
        for name, parameter in source.module(dtype).named_parameters():
            pieces = source.stored(name)
            if len(pieces) == 1:
                yield name, pieces[0].to(parameter.dtype).view(parameter.shape)
            else:
                joined = torch.cat([piece.to(parameter.dtype) for piece in pieces])
                yield name, joined.view(parameter.shape)

    def load(self, part: str, dtype: torch.dtype) -> nn.Module:
        """The reference module with its weights, ready to run."""
        module = self._part(part).module(dtype)
        module.load_state_dict(dict(self.read(part, dtype)), assign=True)
        return module.eval().requires_grad_(False)

    def write(
        self,
        part: str,
        dtype: torch.dtype,
        path: Path,
        progress: Progress | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> list[Path]:
        """Stream the prepared tensors of a part into `path`, and return the files.

        A part of more than `shard_bytes` becomes ``<stem>-00001-of-00004.safetensors`` and so on.
        Files appear whole or not at all, and always with the same bytes for the same weights. One
        that is already there with this content is kept: an interrupted preparation goes on.
        """
        source = self._part(part)
        plan: Plan = {
            name: (parameter.dtype, tuple(parameter.shape))
            for name, parameter in source.module(dtype).named_parameters()
        }
        return list(write_shards(path, plan, source.stored, shard_bytes, progress))

    def _part(self, name: str) -> Part:
        if name not in self.parts:
            raise SettingsError(
                f"{self.variant.name} has no part {name!r}. It has {', '.join(self.parts)}."
            )
        return self.parts[name]


def find_nonfinite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those tensors that hold NaN or infinity."""
    return [name for name, tensor in tensors if not bool(torch.isfinite(tensor.float()).all())]
