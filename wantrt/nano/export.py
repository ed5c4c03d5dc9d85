"""Writes trained weights as a checkpoint folder in the Diffusers layout, in float16."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wantrt.checkpoints.checkpoint import Checkpoint, Part, part_configs
from wantrt.checkpoints.layouts import write_diffusers
from wantrt.checkpoints.tensors import Stored
from wantrt.config import Variant
from wantrt.nano.tokenizer import save_tokenizer


class ModuleTensors:
    """The parameters of a module under their own, prepared names."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {name: p.detach() for name, p in module.named_parameters()}
        self.specs: Mapping[str, Stored] = {
            name: Stored(p.dtype, tuple(p.shape)) for name, p in self._parameters.items()
        }

    def read(self, name: str) -> Tensor:
        return self._parameters[name].contiguous()


def export_checkpoint(variant: Variant, modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Write the folder. ``modules`` are the parts by name: transformer, text_encoder, vae."""
    configs = part_configs(variant)
    parts = {
        name: Part(name, configs[name], ModuleTensors(module), "prepared")
        for name, module in modules.items()
    }
    checkpoint = Checkpoint(variant, None, parts, source="training")
    write_diffusers(checkpoint, folder, torch.float16)
    save_tokenizer(folder / "tokenizer")
    index = folder / "model_index.json"  # T5TokenizerFast would make a Unigram model of our words
    index.write_text(index.read_text().replace("T5TokenizerFast", "PreTrainedTokenizerFast"))
