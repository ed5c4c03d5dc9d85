"""diffusers with `torch.compile`, as its documentation recommends it: the repeated blocks of the
transformer (regional compilation), and the decoder of the VAE.

https://huggingface.co/docs/diffusers/optimization/fp16
"""

from typing import Any

from wantrt.bench.peers.diffusers_eager import DiffusersEager
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)


class DiffusersCompiled(DiffusersEager):
    """See `wantrt.bench.peers.base.Engine`. The first runs compile, which is not timed."""

    name = "diffusers compiled"

    def prepare_transformer(self, model: Any) -> None:
        model.compile_repeated_blocks(fullgraph=True)

    def prepare_vae(self, vae: Any) -> None:
        vae.decoder.compile()


Peer = DiffusersCompiled
