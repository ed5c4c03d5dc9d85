"""What a transformer block must cost at least: FLOPs of its products, bytes of the rest.

A multiplication and an addition are two FLOPs. Attention is counted in full (4 L S C). The bytes
are those of the ops between the products, each input read once, each output written once.
"""

from dataclasses import dataclass

import torch

from wantrt.bench import kernel_cases
from wantrt.config import DiTConfig
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)


@dataclass(frozen=True)
class BlockCost:
    """Of one block and one batch."""

    gemm_flops: int
    attention_flops: int
    rest_bytes: int

    @property
    def flops(self) -> int:
        return self.gemm_flops + self.attention_flops

    def floor_ms(self, matrix_rate: float, copy_rate: float) -> dict[str, float]:
        """Milliseconds if everything ran at the machine's best rates, FLOP/s and bytes/s.

        The parts follow one another: while a product runs, the rest does not.
        """
        parts = {
            "gemm": 1e3 * self.gemm_flops / matrix_rate,
            "attention": 1e3 * self.attention_flops / matrix_rate,
            "rest": 1e3 * self.rest_bytes / copy_rate,
        }
        return {name: round(ms, 4) for name, ms in (parts | {"all": sum(parts.values())}).items()}


def block_cost(config: DiTConfig, tokens: int, text_rows: int, dtype: torch.dtype) -> BlockCost:
    """Batch 1."""
    c, f, n, s = config.dim, config.ffn_dim, tokens, text_rows
    own = 2 * n * c * 3 * c + 2 * n * c * c  # qkv, out
    cross = 2 * n * c * c + 2 * s * c * 2 * c + 2 * n * c * c  # q, kv, out
    feed_forward = 2 * 2 * n * c * f
    rest = (
        kernel_cases.modulate(n, c, dtype),
        kernel_cases.qk_norm_rope(n, c, dtype, head_dim=config.head_dim),
        kernel_cases.gated_residual_norm(n, c, dtype),
        kernel_cases.rms_norm(n, c, dtype),  # q of the cross-attention
        kernel_cases.rms_norm(s, c, dtype),  # its k
        kernel_cases.gated_residual_modulate(n, c, dtype, gated=False),
        kernel_cases.gated_residual(n, c, dtype),
    )
    return BlockCost(
        gemm_flops=own + cross + feed_forward,
        attention_flops=4 * n * n * c + 4 * n * s * c,
        rest_bytes=sum(case.bytes_moved for case in rest),
    )
