"""A small Wan pipeline of diffusers' own modules, saved as a checkpoint for our readers."""

from pathlib import Path

import tokenizers
import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "blue", "cat", "dog", "surfing", "runs", "blurry", "static")


def make_pipeline(*, experts: int = 1, flow_shift: float = 3.0) -> WanPipeline:
    """Two blocks of width 64, a VAE of base width 8, a text encoder of two layers."""
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    transformers = [make_transformer() for _ in range(experts)]
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=_text_encoder(len(vocabulary)),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        boundary_ratio=0.875 if experts == 2 else None,
        vae=_vae(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift
        ),
    )


def save(pipeline: WanPipeline, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def make_transformer(num_heads: int = 2, num_layers: int = 2) -> WanTransformer3DModel:
    """Blocks of width 32 a head."""
    model = WanTransformer3DModel(
        num_attention_heads=num_heads,
        attention_head_dim=32,
        in_channels=16,
        out_channels=16,
        text_dim=48,
        ffn_dim=96,
        num_layers=num_layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()
    for name, parameter in model.named_parameters():  # initial ones and zeros would hide mix-ups
        if "norm" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def _text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=48, d_kv=12, d_ff=80, num_layers=2, num_heads=4
    )
    model = UMT5EncoderModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def _vae() -> AutoencoderKLWan:
    model = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1).eval()
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model
