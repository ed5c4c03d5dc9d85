"""The tokenizer of the nano checkpoint: one token a word, over the words the captions use.

Same file format and same habits as UMT5's (``tokenizer.json``; <pad> 0, </s> 1, <unk> 2; </s>
appended at the end), except that case and punctuation do not matter.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from wantrt.nano.scenes import caption_words

SPECIAL = ("<pad>", "</s>", "<unk>")
TEXT_LEN = 32  # rows that the transformer's cross-attention sees


def build_tokenizer() -> Tokenizer:
    """The tokenizer, from the captions' words; ids are stable as long as the words are."""
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *caption_words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\w]+"), behavior="removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", SPECIAL.index("</s>"))]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write ``tokenizer.json`` and what transformers needs beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": TEXT_LEN,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
