"""Classifier-free guidance, in float32 whatever the transformer's dtype."""

from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """``unconditional + guidance_scale * (conditional - unconditional)``, float32, same shape.

    The difference of two nearly equal velocities is what gets amplified, so it is not left to bf16.
    guidance_scale: a number, or a one-element tensor where a captured graph must serve any scale.
    """
    base = unconditional.float()
    return base + guidance_scale * (conditional.float() - base)
