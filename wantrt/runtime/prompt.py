"""Prompt in, token ids out, as the official code does it."""

import html
import logging
import re
from pathlib import Path

import torch
from torch import Tensor

from wantrt.errors import BundleError

log = logging.getLogger("wantrt")


def clean_prompt(prompt: str) -> str:
    """Mend broken Unicode and HTML entities, collapse white space. Case and punctuation stay."""
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A ``tokenizer.json`` that ends every prompt with EOS and truncates to `max_tokens`."""

    def __init__(self, path: Path, max_tokens: int) -> None:
        """Raises BundleError for a file that is not a tokenizer."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"{path} is not a tokenizer.json: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.max_tokens = max_tokens
        self._warned: set[str] = set()

    def __call__(self, prompt: str) -> Tensor:
        """Ids of the cleaned prompt with its EOS, int64 [1, S], 1 <= S <= max_tokens."""
        ids = self._tokenizer.encode(clean_prompt(prompt)).ids
        if len(ids) > self.max_tokens:
            if prompt not in self._warned:
                self._warned.add(prompt)
                log.warning(
                    "the prompt has %d tokens, the model reads %d: its end is ignored (%s…)",
                    len(ids),
                    self.max_tokens,
                    clean_prompt(prompt)[:40],
                )
            ids = ids[: self.max_tokens - 1] + ids[-1:]  # EOS stays last
        return torch.tensor([ids], dtype=torch.int64)
