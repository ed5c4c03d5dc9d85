"""The benchmark's cases at sizes that a CPU can run."""

import torch

from wantrt.bench import kernel_cases as cases

CHANNELS, TOKENS = 256, 21
DTYPES = (torch.bfloat16, torch.float32)


def small_cases(dtypes=DTYPES):
    found = []
    for dtype in dtypes:
        found += cases.token_cases(TOKENS, CHANNELS, dtype)
        found += [
            op(TOKENS, CHANNELS, dtype, rows=2)
            for op in (
                cases.modulate,
                cases.gated_residual,
                cases.gated_residual_modulate,
                cases.gated_residual_norm,
            )
        ]
        shape = (1, 96, 2, 3, 3)
        found += [cases.rms_silu(shape, dtype, last) for last in (False, True)]
    latent = (1, 16, 3, 4, 5)
    return [*found, *(cases.guide_and_step(latent, guided) for guided in (True, False))]
