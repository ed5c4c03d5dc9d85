"""Finds out what a checkpoint is: where it lies, its layout, its dimensions, its variant."""

import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from wantrt.checkpoints import configs
from wantrt.checkpoints.checkpoint import Checkpoint, Part, meta_module, part_configs
from wantrt.checkpoints.configs import Fields
from wantrt.checkpoints.folder import Folder
from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.checkpoints.hub import fetch
from wantrt.checkpoints.hybrid import join
from wantrt.checkpoints.names import HF_IMAGE_PREFIX, Layout
from wantrt.checkpoints.tensors import StoredTensors, Unprefixed
from wantrt.checkpoints.variants import identify, with_dimensions
from wantrt.config import (
    SHIPPED,
    VARIANTS,
    DiTConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
    Variant,
    find_variant,
    require_task,
)
from wantrt.errors import CheckpointError, SettingsError
from wantrt.experts import is_list_of_experts, parse_experts

log = logging.getLogger("wantrt")

REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
RANDOM = re.compile(r"random:(\d+)(?::(.*))?")
NUMBER = re.compile(r"\s*[0-9]{1,9}\s*")

DIT_STEM = "diffusion_pytorch_model"
OFFICIAL_VAE_STEM = "*_VAE"
OFFICIAL_TEXT_STEM = "models_t5*"
OFFICIAL_IMAGE_STEM = "models_clip*"
IMAGE_TENSOR = "img_emb.proj.0.weight"  # of an official transformer that takes image features
DIFFUSERS_TEXT_STEM = "text_encoder/model"
DIFFUSERS_IMAGE_STEM = "image_encoder/model"
OFFICIAL_TOKENIZER = "google/umt5-xxl/tokenizer.json"
DIFFUSERS_TOKENIZER = "tokenizer/tokenizer.json"

DIFFUSERS_TASKS = {
    "WanPipeline": "t2v",
    "WanImageToVideoPipeline": "i2v",
    "WanVACEPipeline": "vace",
    "WanAnimatePipeline": "animate",
}


def open_checkpoint(source: str | Path | None = None, variant: str | None = None) -> Checkpoint:
    """Open a checkpoint and check it, reading nothing but headers.

    `source` is a folder (official or Diffusers layout), a Hugging Face repository id, experts of
    several sources (wantrt/experts.py), or
    ``random:SEED`` (generated weights; ``random:SEED:dim=256,num_heads=4,vae.encoder_dim=32``
    changes dimensions: plain names are the transformer's, ``vae.``, ``text_encoder.`` and
    ``image_encoder.`` the others'). None is the official repository of `variant`, or what ships
    with wantrt (nano, nano-i2v).

    Raises CheckpointError for what is missing, damaged or does not fit, SettingsError for what is
    asked wrongly, UnsupportedTaskError for a task that is not there yet.
    """
    requested = None if variant is None else find_variant(variant)
    if requested is not None:
        require_task(requested.task, requested.name)
    text = str(source) if source is not None else _default_source(requested)
    if text.startswith("random:"):
        checkpoint = _generated(text, requested or VARIANTS["nano"])
    elif os.path.isdir(text):  # Path.is_dir raises where a text is too long for a name
        checkpoint = _open_folder(Path(text), text, requested)
    elif is_list_of_experts(text):
        checkpoint = _open_hybrid(text, requested)
    elif REPO_ID.fullmatch(text):
        checkpoint = fetch(text, lambda path: _open_folder(path, text, requested))
    else:
        raise CheckpointError(
            f"no checkpoint {text!r}: there is no such folder, and it is no repository id "
            "(organisation/name) and not random:SEED. Give --checkpoint one of the three."
        )
    checkpoint.check()
    for note in checkpoint.notes:
        log.info(note)
    return checkpoint


def _open_hybrid(text: str, requested: Variant | None) -> Checkpoint:
    if requested is not None:
        raise SettingsError(
            f"the experts name their variants: leave --variant {requested.name} out"
        )
    ranges = parse_experts(text)
    opened = [open_checkpoint(one.checkpoint, one.split_name()[0]) for one in ranges]
    return join(ranges, opened)


def _default_source(requested: Variant | None) -> str:
    row = requested or VARIANTS["nano"]
    shipped = SHIPPED.get(row.name)
    if shipped is not None and not shipped.is_dir():
        raise CheckpointError(
            f"the {row.name} checkpoint is missing from this installation: {shipped}. Install "
            "wantrt again, or name a checkpoint with --checkpoint."
        )
    source = str(shipped) if shipped else row.repo_id
    if source is None:
        raise SettingsError(f"{row.name} has no repository. Name one with --checkpoint.")
    return source


# -- Generated ------------------------------------------------------------------------------------


def _generated(source: str, row: Variant) -> Checkpoint:
    match = RANDOM.fullmatch(source)
    if match is None:
        raise SettingsError(
            f"{source!r} is no generated checkpoint. Expected random:SEED or "
            "random:SEED:field=value,…, such as random:0:dim=256,num_heads=4,num_layers=2."
        )
    variant = _resized(row, match[2] or "")
    parts = {
        name: Part(
            name=name,
            config=config,
            tensors=GeneratedTensors(int(match[1]), name, meta_module(config, torch.float32)),
            layout="prepared",
            origin=f"random:{match[1]}/{name}",
        )
        for name, config in part_configs(variant).items()
    }
    tokenizer = SHIPPED["nano"] / DIFFUSERS_TOKENIZER  # any will do: the weights know no words
    return Checkpoint(
        variant=variant,
        layout=None,
        parts=parts,
        source=source,
        tokenizer=tokenizer if tokenizer.is_file() else None,
    )


def _resized(row: Variant, changes: str) -> Variant:
    """The row with the dimensions that ``dim=256,vae.encoder_dim=32`` asks for."""
    kinds = {
        "dit": DiTConfig,
        "vae": VAEConfig,
        "text_encoder": TextEncoderConfig,
        **({"image_encoder": ImageEncoderConfig} if row.image_encoder else {}),
    }
    given: dict[str, dict[str, Any]] = {part: {} for part in kinds}
    for change in filter(None, changes.split(",")):
        path, _, value = change.partition("=")
        part, _, name = path.strip().rpartition(".")
        part = part or "dit"
        known = [f.name for f in fields(kinds[part]) if f.type is int] if part in kinds else []
        largest = configs.MAX_LAYERS if name == "num_layers" else configs.MAX_DIM
        number = int(value) if NUMBER.fullmatch(value) else 0
        if name not in known or not 0 < number <= largest:
            others = "|".join(f"{other}." for other in kinds if other != "dit")
            raise SettingsError(
                f"random: cannot set {change!r}. Expected [{others}]field=number, from 1 "
                f"to {largest}" + (f", with one of {', '.join(known)}." if known else ".")
            )
        given[part][name] = number
    text_encoder = configs.checked_text_encoder(
        replace(row.text_encoder, **given["text_encoder"]), "random, text encoder"
    )
    image_encoder = row.image_encoder
    if image_encoder is not None:
        image_encoder = configs.checked_image_encoder(
            replace(image_encoder, **given["image_encoder"]), "random, image encoder"
        )
    vae = configs.with_statistics(replace(row.vae, **given["vae"])) if given["vae"] else row.vae
    parts = replace(row, vae=vae, text_encoder=text_encoder, image_encoder=image_encoder)
    dits = [
        configs.checked_dit(
            _shortened(replace(expert.dit, **(_linked(expert.dit, parts) | given["dit"]))),
            "random, transformer",
        )
        for expert in row.experts
    ]
    return with_dimensions(row, dits, vae, text_encoder, image_encoder)


def _linked(dit: DiTConfig, parts: Variant) -> dict[str, Any]:
    """The dimensions of a transformer that are those of the other parts."""
    z_dim, image_encoder = parts.vae.z_dim, parts.image_encoder
    conditioned = dit.in_channels > dit.out_channels
    return {
        "text_dim": parts.text_encoder.dim,
        "in_channels": z_dim + (4 + z_dim if conditioned else 0),  # mask and condition latent
        "out_channels": z_dim,
        "image_dim": image_encoder.dim if image_encoder else None,
        "image_positions": parts.image_rows if dit.image_positions else None,
    }


def _shortened(dit: DiTConfig) -> DiTConfig:
    """Without the hints that would enter behind the last layer."""
    return replace(dit, vace_layers=tuple(n for n in dit.vace_layers if n < dit.num_layers))


# -- Folders --------------------------------------------------------------------------------------


def _open_folder(path: Path, source: str, requested: Variant | None) -> Checkpoint:
    folder = Folder(path)
    if folder.file("transformer/config.json") or folder.file("model_index.json"):
        return _Opening(folder, source, requested, "diffusers").diffusers()
    if folder.file("config.json") or folder.file("high_noise_model/config.json"):
        return _Opening(folder, source, requested, "official").official()
    raise CheckpointError(
        f"{path} is no checkpoint. Looked for transformer/config.json (Diffusers layout), "
        "config.json and high_noise_model/config.json (official layout), and found none."
    )


@dataclass(frozen=True)
class _Opening:
    """One folder while it is being read."""

    folder: Folder
    source: str
    requested: Variant | None
    layout: Layout

    def official(self) -> Checkpoint:
        two = self.folder.file("high_noise_model/config.json") is not None
        folders = ["high_noise_model/", "low_noise_model/"] if two else [""]
        config_files = [self._config(f"{folder}config.json") for folder in folders]
        task = _official_task(config_files[0])
        self._require_task(task)
        dit_stems = [f"{folder}{DIT_STEM}" for folder in folders]
        first = self.folder.tensors(dit_stems[0])
        image_stems = [OFFICIAL_IMAGE_STEM] if first and IMAGE_TENSOR in first.specs else []
        tensors = self._all_tensors(
            [OFFICIAL_TEXT_STEM, *image_stems, *dit_stems, OFFICIAL_VAE_STEM]
        )
        text, vae = tensors[OFFICIAL_TEXT_STEM].specs, tensors[OFFICIAL_VAE_STEM].specs
        dits = [
            configs.official_dit(config, tensors[stem].specs, str(config.path))
            for config, stem in zip(config_files, dit_stems, strict=True)
        ]
        vae_config = configs.official_vae(vae, f"the VAE of {self.source}")
        text_config = configs.official_text_encoder(text, f"the text encoder of {self.source}")
        image_config = None
        if image_stems:
            image_config = configs.official_image_encoder(
                tensors[OFFICIAL_IMAGE_STEM].specs, f"the image encoder of {self.source}"
            )
        return self._checkpoint(
            self._identify(task, dits, vae_config, text_config, image_config),
            tensors.values(),
            tokenizer=OFFICIAL_TOKENIZER,
        )

    def diffusers(self) -> Checkpoint:
        index = self.folder.json("model_index.json") or {}
        two = _names_second(index) or self.folder.file("transformer_2/config.json") is not None
        folders = ["transformer", "transformer_2"] if two else ["transformer"]
        config_files = [self._config(f"{folder}/config.json") for folder in folders]
        task = _diffusers_task(index, config_files[0])
        self._require_task(task)
        dits = [configs.diffusers_dit(config) for config in config_files]
        image_stems = [DIFFUSERS_IMAGE_STEM] if dits[0].image_dim else []
        tensors = self._all_tensors(
            [
                DIFFUSERS_TEXT_STEM,
                *image_stems,
                *(f"{folder}/{DIT_STEM}" for folder in folders),
                f"vae/{DIT_STEM}",
            ]
        )
        vae_config = configs.diffusers_vae(self._config("vae/config.json"))
        text_config = configs.diffusers_text_encoder(self._config("text_encoder/config.json"))
        image_config = None
        if image_stems:
            image_config = configs.diffusers_image_encoder(
                self._config("image_encoder/config.json")
            )
            tensors[DIFFUSERS_IMAGE_STEM] = Unprefixed(
                tensors[DIFFUSERS_IMAGE_STEM], HF_IMAGE_PREFIX
            )
        recorded = {"model_index": index, "scheduler_config": self._scheduler()}
        variant, note = self._identify(task, dits, vae_config, text_config, image_config)
        ratio = index.get("boundary_ratio")
        if variant.name == "custom" and two and ratio is not None:
            variant = replace(variant, boundary_ratios=(self._boundary_ratio(ratio),))
        return self._checkpoint(
            (variant, note),
            tensors.values(),
            tokenizer=DIFFUSERS_TOKENIZER,
            settings={name: values for name, values in recorded.items() if values},
        )

    def _checkpoint(
        self,
        identified: tuple[Variant, str | None],
        tensors: Iterable[StoredTensors],
        tokenizer: str,
        settings: dict[str, Any] | None = None,
    ) -> Checkpoint:
        """tensors: of every part, in the order of `part_configs`."""
        variant, note = identified
        parts = {
            name: Part(name=name, config=config, tensors=stored, layout=self.layout)
            for (name, config), stored in zip(part_configs(variant).items(), tensors, strict=True)
        }
        return Checkpoint(
            variant=variant,
            layout=self.layout,
            parts=parts,
            source=self.source,
            settings=settings or {},
            tokenizer=self.folder.file(tokenizer),
            notes=(note,) if note else (),
        )

    def _identify(
        self,
        task: str,
        dits: list[DiTConfig],
        vae: VAEConfig,
        text_encoder: TextEncoderConfig,
        image_encoder: ImageEncoderConfig | None,
    ) -> tuple[Variant, str | None]:
        return identify(
            task,
            dits,
            vae,
            text_encoder,
            image_encoder,
            requested=self.requested,
            source=self.source,
        )

    def _require_task(self, task: str) -> None:
        if self.requested is not None and self.requested.task != task:
            raise CheckpointError(
                f"{self.source} is a {task} checkpoint, {self.requested.name} is "
                f"{self.requested.task}. Leave --variant out to take it as it is."
            )
        require_task(task, self.source)

    def _config(self, name: str) -> Fields:
        values = self.folder.json(name)
        if values is None:
            raise CheckpointError(f"{self.source} has no {name}. Download or copy it too.")
        return Fields(self.folder.path / name, values)

    def _boundary_ratio(self, ratio: object) -> float:
        if not isinstance(ratio, float) or not 0 < ratio < 1:
            raise CheckpointError(
                f"{self.folder.path / 'model_index.json'} says boundary_ratio is {ratio!r}. "
                "Expected a sigma between 0 and 1, as 0.875."
            )
        return ratio

    def _scheduler(self) -> dict[str, Any]:
        """The recorded scheduler; its shift, which `--convention diffusers` takes, is a number."""
        name = "scheduler/scheduler_config.json"
        values = self.folder.json(name) or {}
        for key in ("flow_shift", "shift"):
            if values.get(key) is not None:
                Fields(self.folder.path / name, values).number(key, 1.0)
        return values

    def _all_tensors(self, stems: list[str]) -> dict[str, StoredTensors]:
        """The tensors of every stem; one error names all that are not there."""
        found = {stem: self.folder.tensors(stem) for stem in stems}
        if missing := [stem for stem, tensors in found.items() if tensors is None]:
            raise CheckpointError(
                f"{self.source} ({self.layout} layout) lacks weights. Looked for "
                + ", ".join(f"{stem}.safetensors" for stem in missing)
                + ", the same with .index.json and shards, and .pth. Download or copy them too."
            )
        return {stem: tensors for stem, tensors in found.items() if tensors is not None}


def _official_task(config: Fields) -> str:
    if config.values.get("_class_name") == "WanAnimateModel":
        return "animate"
    task = config.values.get("model_type")
    known = sorted({row.task for row in VARIANTS.values()})
    if task not in known:
        raise CheckpointError(
            f"{config.path} says model_type is {task!r}. Expected one of {', '.join(known)}."
        )
    return str(task)


def _names_second(index: dict[str, Any]) -> bool:
    """Whether ``model_index.json`` speaks of a second transformer; [null, null] is none."""
    return index.get("transformer_2") not in (None, [None, None])


def _diffusers_task(index: dict[str, Any], transformer: Fields) -> str:
    """From the pipeline's class where it is recorded, and from what the transformer takes."""
    if index.get("expand_timesteps"):
        return "ti2v"
    if "pos_embed_seq_len" in transformer:
        return "flf2v"
    if "vace_layers" in transformer:
        return "vace"
    task = DIFFUSERS_TASKS.get(str(index.get("_class_name")))
    if task is None:
        wider = transformer.values.get("in_channels") != transformer.values.get("out_channels")
        task = "i2v" if wider else "t2v"
    return task
