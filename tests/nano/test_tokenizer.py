import random

import pytest
from tokenizers import Tokenizer

from wantrt.config import VARIANTS
from wantrt.nano.clips import random_scenes
from wantrt.nano.scenes import caption, combinations, load_held_out
from wantrt.nano.tokenizer import build_tokenizer, save_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


def test_special_tokens_are_those_of_umt5(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]
    assert tokenizer.encode("").ids == [1]


def test_case_and_punctuation_do_not_matter(tokenizer):
    plain = tokenizer.encode("a red circle moves right")
    assert tokenizer.encode("A RED  circle, moves right!").ids == plain.ids
    assert plain.tokens == ["a", "red", "circle", "moves", "right", "</s>"]


def test_every_caption_is_known_and_fits(tokenizer):
    rng = random.Random(0)
    captions = [caption(scene, rng) for scene in random_scenes(combinations(), 2000, rng)]
    captions += [str(entry["prompt"]) for entry in load_held_out()]
    for text in captions:
        ids = tokenizer.encode(text).ids
        assert 2 not in ids, text
        assert len(ids) <= VARIANTS["nano"].experts[0].dit.text_len


def test_the_embedding_has_a_row_for_every_word(tokenizer):
    assert tokenizer.get_vocab_size() <= VARIANTS["nano"].text_encoder.vocab_size


def test_transformers_reads_the_folder_too(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    batch = theirs(["a red circle moves right", "hello"], padding="max_length", max_length=8)
    assert batch["input_ids"][0] == [*tokenizer.encode("a red circle moves right").ids, 0, 0]
    assert batch["attention_mask"][1] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hello").ids == [2, 1]
