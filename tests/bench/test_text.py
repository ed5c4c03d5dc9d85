"""The text encoder's times: each of a prompt that was encoded, at the length that is said."""

import json
import re
import weakref

import pytest
import torch

from tests.bench.commands import ran, refusal
from tests.small import small_bundle
from wantrt.bench import text
from wantrt.bench.floor import text_cost
from wantrt.bench.rates import Rates
from wantrt.bench.text import RandomTokens, measure
from wantrt.bundle import Bundle
from wantrt.runtime.text import TextEncoder

RATES = Rates(matrix=1e10, attention=1e10, copy=1e10)
BOTH = {"onnxruntime": RATES, "torch": RATES}


def test_rows(monkeypatch):
    bundle, encoded = Bundle.load(small_bundle()), []
    run = TextEncoder._run

    def counted(self, prompts, on_stack):
        encoded.extend(prompts)
        return run(self, prompts, on_stack)

    monkeypatch.setattr(TextEncoder, "_run", counted)
    rows_of_text = bundle.variant.experts[0].dit.text_len
    lengths = (3, rows_of_text)
    rows = list(measure(bundle, ["onnxruntime", "torch"], lengths, BOTH, warmup=1, runs=2))
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


def test_a_runtime_does_not_keep_the_one_before(monkeypatch):
    """Its sessions are gone when the next one's memory is read."""
    bundle, loaded, alive = Bundle.load(small_bundle()), [], []

    def remember(*given):
        alive.append([session() is not None for session in loaded])
        sessions = load_part(*given)
        loaded.extend(map(weakref.ref, sessions["text_stack"]))
        return sessions

    load_part = text.load_part
    monkeypatch.setattr(text, "load_part", remember)
    list(measure(bundle, ["torch", "torch"], [3], BOTH, warmup=1, runs=1))
    assert len(loaded) > 0
    assert not any(alive[1])


def test_each_length_has_its_own_peak(monkeypatch):
    reset = []
    monkeypatch.setattr(text.Peaks, "reset", lambda self: reset.append(self))
    list(measure(Bundle.load(small_bundle()), ["torch"], [3, 4], BOTH, warmup=1, runs=1))
    assert len(reset) == 2


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch):
    run, left = TextEncoder._run, iter(range(3 + 2))  # one length, and one run of the next

    def interrupted(*given):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return run(*given)

    monkeypatch.setattr(TextEncoder, "_run", interrupted)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        bundle = Bundle.load(small_bundle())
        for row in measure(bundle, ["torch"], [3, 4, 5], BOTH, warmup=1, runs=2):
            rows.append(row)
    assert [(row["tokens"], row["text_s"]["runs"]) for row in rows] == [(3, 2), (4, 1)]


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
