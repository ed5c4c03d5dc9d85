"""The nodes of a graph that have a kernel, by their type in the domain "wantrt"."""

from wantrt.kernels import gated_residual, modulate
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

PLUGINS = {
    plugin.name: plugin for module in (gated_residual, modulate) for plugin in module.PLUGINS
}
