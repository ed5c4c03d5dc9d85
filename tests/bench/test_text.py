"""The text encoder's times: each of a prompt that was encoded, at the length that is said."""

import json
import re

import pytest
import torch

from tests.bench.commands import ran, refusal
from tests.small import small_bundle
from wantrt.bench.floor import text_cost
from wantrt.bench.rates import Rates
from wantrt.bench.text import RandomTokens, measure
from wantrt.bundle import Bundle
from wantrt.runtime.text import TextEncoder

RATES = Rates(matrix=1e10, attention=1e10, copy=1e10)


def test_rows(monkeypatch):
    bundle, encoded = Bundle.load(small_bundle()), []
    run = TextEncoder._run

    def counted(self, prompts, on_stack):
        encoded.extend(prompts)
        return run(self, prompts, on_stack)

    monkeypatch.setattr(TextEncoder, "_run", counted)
    rows_of_text = bundle.variant.experts[0].dit.text_len
    lengths = (3, rows_of_text)
    rows = list(measure(bundle, ["onnxruntime", "torch"], lengths, RATES, warmup=1, runs=2))
    assert [(row["runtime"], row["tokens"]) for row in rows] == [
        (runtime, tokens) for runtime in ("onnxruntime", "torch") for tokens in lengths
    ]
    assert encoded == [str(row["tokens"]) for row in rows for _ in range(3)]
    for row in rows:
        assert row["variant"] == bundle.variant.name
        assert row["text_s"]["runs"] == 2
        assert row["floor_fraction"] == pytest.approx(row["floor_s"] / row["text_s"]["median"])
    whole = text_cost(bundle.variant, torch.float32)
    assert rows[1]["flops"] == whole.flops
    assert rows[0]["flops"] < whole.flops


def test_tokens_have_the_length_that_is_asked_for():
    tokens = RandomTokens(vocab_size=50, max_tokens=16)("12")
    assert tokens.shape == (1, 12)
    assert 3 <= tokens.min() <= tokens.max() < 50


def test_command(tmp_path, capsys):
    """nano's own encoder, whole."""
    asked = "--runtime onnxruntime --tokens 8,32 --warmup 1 --runs 2"
    assert ran("text", *asked.split(), "--out", tmp_path) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(shown[-1])
    assert [row["tokens"] for row in result["rows"]] == [8, 32]
    assert result["settings"]["layers"] == 2
    assert {row["variant"] for row in result["rows"]} == {result["settings"]["variant"]} == {"nano"}
    assert max(len(line) for line in shown if re.search("[┃│]", line)) <= 100


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--variant 15B", "unknown variant '15b'"),
        ("--tokens 0", "from 1 to 32"),
        ("--tokens 33", "from 1 to 32"),
        ("--layers 1", "--layers is for generated weights"),
        ("--variant 1.3B --layers 0", "0 is not in the range"),
        ("--runtime onnxruntime --precision bf16", "does not run"),
    ],
)
def test_bad_input(arguments, said, tmp_path, capsys):
    assert said in refusal("text", arguments, tmp_path, capsys)
