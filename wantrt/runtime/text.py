"""Text encoder: prompts in, text embeddings out, a stack of layers at a time.

UMT5-XXL is 22.7 GB in float32. Weights are memory-mapped and the layers run in order, so only the
stack at work needs to be in memory; every prompt passes a stack before the next stack is touched.
A prompt runs alone and at its own length: padding cannot change what it gets, nor can the prompts
it shares a call with, so an embedding is the same bits whenever and with whomever it is computed.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrt.config import TextEncoderConfig
from wantrt.device import Device
from wantrt.models.umt5 import position_buckets
from wantrt.session import Session

CACHED_PROMPTS = 64


class Tokenize(Protocol):
    """Token ids of a prompt, int64 [1, S], 1 <= S <= max_tokens."""

    max_tokens: int

    def __call__(self, prompt: str) -> Tensor: ...


class TextEncoder:
    """Embeds prompts and remembers the last ones."""

    def __init__(
        self,
        config: TextEncoderConfig,
        tokenizer: Tokenize,
        sessions: Mapping[str, Sequence[Session]],
        device: Device,
    ) -> None:
        self.config, self.tokenizer, self.sessions, self.device = (
            config,
            tokenizer,
            sessions,
            device,
        )
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    def encode(
        self, prompts: Sequence[str], on_stack: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Embeddings [B, text_len, C] float32; rows past a prompt's last token are zero.

        `on_stack(done, total)` is called after every stack of layers that had to run.
        """
        missing = list(dict.fromkeys(p for p in prompts if p not in self._cache))
        if missing:
            for prompt, embeds in zip(missing, self._run(missing, on_stack), strict=True):
                self._cache[prompt] = embeds
        for prompt in prompts:
            self._cache.move_to_end(prompt)
        found = torch.cat([self._cache[prompt] for prompt in prompts])
        while len(self._cache) > CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return found

    def forget(self) -> None:
        """Embed every prompt anew from now on."""
        self._cache.clear()

    def _run(
        self, prompts: Sequence[str], on_stack: Callable[[int, int], None] | None
    ) -> list[Tensor]:
        where = self.device.torch_device
        tokens = [self.tokenizer(prompt).to(where) for prompt in prompts]  # [1, S] each
        masks = [torch.ones(t.shape, dtype=torch.float32, device=where) for t in tokens]
        buckets = [position_buckets(self.config, t.shape[1], where) for t in tokens]
        embed, head = self.sessions["text_embed"][0], self.sessions["text_head"][0]
        hidden = [embed.run({"tokens": t})["hidden"].clone() for t in tokens]
        stacks = self.sessions["text_stack"]
        for done, stack in enumerate(stacks, 1):
            for i, (mask, position) in enumerate(zip(masks, buckets, strict=True)):
                inputs = {"hidden": hidden[i], "position_buckets": position, "mask": mask}
                hidden[i] = stack.run(inputs)["hidden_out"].clone()
            if on_stack is not None:
                on_stack(done, len(stacks))
        embeds = [
            head.run({"hidden": h, "mask": m})["text_embeds"]
            for h, m in zip(hidden, masks, strict=True)
        ]
        rows = self.tokenizer.max_tokens
        return [F.pad(e, (0, 0, 0, rows - e.shape[1])) for e in embeds]  # [1, text_len, C]
