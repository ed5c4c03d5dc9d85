"""The nodes of a graph that have a kernel, by their type in the domain "wantrt"."""

from wantrt.kernels import (
    gated_residual,
    guide_and_step,
    modulate,
    qk_norm_rope,
    rms_norm,
    rms_silu,
    rope,
)
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

MODULES = (gated_residual, guide_and_step, modulate, qk_norm_rope, rms_norm, rms_silu, rope)
PLUGINS = {plugin.name: plugin for module in MODULES for plugin in module.PLUGINS}
