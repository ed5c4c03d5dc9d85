"""A transformer block that a CPU runs in milliseconds: two heads of a real head's width."""

from wantrt.config import DiTConfig

CONFIG = DiTConfig(dim=256, ffn_dim=320, num_heads=2, num_layers=1, text_len=7)
LATENT = (2, 4, 6)  # 12 tokens
