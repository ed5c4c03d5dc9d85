"""Predicted memory: ordered by policy, and checked before any work."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.runtime.devices import SETTINGS
from tests.small import small_bundle
from wantrt import Pipeline
from wantrt.bundle import Bundle
from wantrt.config import VARIANTS
from wantrt.device import CPUDevice
from wantrt.errors import SettingsError
from wantrt.runtime import memory
from wantrt.runtime.loading import RUNTIMES
from wantrt.runtime.memory import check_memory, phases, predict


def of_14b(size: tuple[int, int] = (832, 480)) -> Any:
    variant = VARIANTS["t2v-14b"]
    precision = {**dict.fromkeys(["text_encoder", "vae"], "bf16")}
    precision |= {expert.name: "bf16" for expert in variant.experts}
    return phases(variant, precision, size, 81)


def test_weights_and_caches_of_14b() -> None:
    text, dit, vae = of_14b()
    assert text.weights_bytes == pytest.approx(5_680_910_336 * 2, rel=1e-3)
    assert dit.weights_bytes == pytest.approx(14.29e9 * 2, rel=0.02)  # some are float32
    assert vae.caches_bytes == 2 * 75_664 * 2 * (60 * 104) * 2  # banks, frames, cells, bytes
    assert dit.streamed_bytes == pytest.approx(dit.weights_bytes / 2, rel=0.05)  # 20 of 40 blocks
    hidden = 2 * 32_760 * 5120 * 4  # of both passes
    assert dit.buffers_bytes == pytest.approx(2 * hidden, rel=0.05)


def test_policies_need_less_and_less() -> None:
    needs = [predict(of_14b(), policy).total_bytes for policy in ("resident", "phase", "stream")]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 3


def test_predicted_weights_are_those_of_the_files() -> None:
    bundle = Bundle.load(small_bundle())
    stacks = {part: bundle.stack_of(part) for part in bundle.precision}
    found = phases(bundle.variant, bundle.precision, (32, 32), 5, stacks)
    for phase in found:
        prepared = bundle.weights(phase.part)
        needed = {n: t for n, t in prepared.items() if not n.startswith("encoder.")}
        assert phase.weights_bytes == sum(tensor.nbytes for tensor in needed.values())


class Card(CPUDevice):
    """Says that it is a GPU with so much memory; nothing can be put there."""

    torch_device = torch.device("cuda")

    def __init__(self, free: float) -> None:
        super().__init__()
        self.free = int(free)

    def free_bytes(self) -> int:
        return self.free


def test_what_does_not_fit_names_the_policy_that_would() -> None:
    needed = of_14b()
    with pytest.raises(SettingsError) as refused:
        check_memory(needed, "resident", Card(45e9), what="832x480 with 81 frames")
    message = str(refused.value)
    assert "not enough memory for 832x480 with 81 frames with --residency resident" in message
    assert "41.9 GiB are free" in message
    assert "Take --residency phase: about" in message
    with pytest.raises(SettingsError, match="Take --residency stream"):
        check_memory(needed, "phase", Card(33e9))
    with pytest.raises(SettingsError, match="smaller --size"):
        check_memory(needed, "stream", Card(8e9))
    check_memory(needed, "resident", Card(65e9))


@pytest.mark.parametrize("policy", ["resident", "phase", "stream"])
def test_nothing_is_loaded_where_it_does_not_fit(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are checked at load if they are to stay, all of it before a first generation."""
    card = Card(10_000)
    monkeypatch.setitem(RUNTIMES, "torch", replace(RUNTIMES["torch"], make_device=lambda: card))
    if policy == "resident":
        with pytest.raises(SettingsError, match="not enough memory for the weights of"):
            Pipeline.load(small_bundle(), "torch", residency=policy)
        return
    with Pipeline.load(small_bundle(), "torch", residency=policy) as pipe:
        with pytest.raises(SettingsError, match="not enough memory for 32x32 with 13 frames"):
            pipe("a red cat", **SETTINGS)
        assert not any(part._sessions for part in pipe.parts.values())


def test_weights_of_a_cpu_stay_in_their_files() -> None:
    """UMT5-XXL in float32, 22.7 GB, runs on a machine with less."""
    on_cpu = Card(20e9)
    on_cpu.torch_device = torch.device("cpu")
    check_memory(of_14b(), "resident", on_cpu)


def test_streamed_weights_must_fit_into_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 64 * 2**30)
    check_memory(of_14b(), "stream", Card(45e9))
    monkeypatch.setattr(memory, "available_memory", lambda: 20 * 2**30)
    with pytest.raises(SettingsError, match=r"weights of transformer in host memory: 27.0 GiB"):
        check_memory(of_14b(), "stream", Card(45e9))
