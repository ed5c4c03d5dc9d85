"""Prompt cleaning and tokenising, against diffusers' cleaning and transformers' tokenizer."""

import logging

import pytest
import tokenizers
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from wantrt.errors import BundleError
from wantrt.runtime.prompt import Tokenizer, clean_prompt


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    """A unigram tokenizer in the form of UMT5's: pad 0, EOS 1 appended by the post-processor."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [("▁cat", -2.5), ("▁a", -2.5), ("猫", -3.0)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    "prompt",
    [
        "  a   cat\n\tsurfing ",
        "Tom &amp;amp; Jerry &lt;3",
        "cafÃ© â€œquotedâ€",
        "一只猫，在冲浪",
        "non\u00a0breaking\u3000space",
        "",
    ],
)
def test_cleaning_is_the_official_one(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_cleaning_of_any_text(prompt):
    assert clean_prompt(prompt) == prompt_clean(prompt)


@pytest.mark.parametrize("prompt", ["a cat", "", "a cat 猫 with ünknown", "cat " * 40])
def test_tokens_are_those_of_transformers(tokenizer_file, prompt):
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    expected = theirs(
        prompt_clean(prompt), max_length=16, truncation=True, return_tensors="pt"
    ).input_ids
    actual = Tokenizer(tokenizer_file, max_tokens=16)(prompt)
    assert actual.tolist() == expected.tolist()
    assert actual[0, -1] == 1


def test_truncation_is_said_once(tokenizer_file, caplog):
    tokenizer = Tokenizer(tokenizer_file, max_tokens=8)
    with caplog.at_level(logging.WARNING, logger="wantrt"):
        assert tokenizer("cat " * 20).shape == (1, 8)
        tokenizer("cat " * 20)
    assert caplog.text.count("the model reads 8") == 1


def test_a_file_that_is_no_tokenizer(tmp_path):
    wrong = tmp_path / "tokenizer.json"
    wrong.write_text('{"version": "1.0"}')
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer(wrong, 8)
    with pytest.raises(BundleError, match="not a tokenizer"):
        Tokenizer(tmp_path / "missing.json", 8)
