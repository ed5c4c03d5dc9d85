"""The plan cache: never the wrong plan, never a damaged one, none compiled twice."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints.small import SMALL
from wantrt.checkpoints import open_checkpoint
from wantrt.engines import cache
from wantrt.engines.cache import Entry, is_trusted, look_up, obtain, plan_key
from wantrt.engines.flavours import Flavour, find_flavour
from wantrt.engines.requests import PlanRequest
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.folder import cache_folder, sha256_of
from wantrt.models.components import Component, vae_components

pytest.importorskip("tensorrt_rtx")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def flavour() -> Flavour:
    return find_flavour("tensorrt-rtx")


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> PlanRequest:
    """The first chunk of a small VAE's decoder, baked."""
    checkpoint = open_checkpoint(SMALL, "t2v-1.3b")
    component = decoder(checkpoint.variant.vae)
    graph = tmp_path_factory.mktemp("graph") / "decoder.onnx"
    export_component(component, graph)
    prepared = dict(checkpoint.read("vae", torch.bfloat16))
    return PlanRequest(
        component=component,
        graph=graph,
        symbols={"h": (4, 4, 4), "w": (4, 4, 4)},
        targets=("sm89",),
        baked={name: prepared[of] for name, of in component.instances[0].items()},
    )


def decoder(config: object) -> Component:
    return vae_components(config, torch.bfloat16, ONNX_OPS)[0]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What TensorRT compiles from here on, by the component's name."""
    names: list[str] = []
    build: Callable = cache.build_apart

    def counted(flavour: Flavour, request: PlanRequest, *rest: object) -> None:
        names.append(request.component.name)
        build(flavour, request, *rest)

    monkeypatch.setattr(cache, "build_apart", counted)
    return names


def fine_tuned(request: PlanRequest) -> PlanRequest:
    """One value of one weight differs."""
    baked = dict(request.baked)
    name = min(baked)
    baked[name] = baked[name].clone()
    baked[name].view(-1)[0] += 1
    return replace(request, baked=baked)


def test_a_plan_is_compiled_once(
    flavour: Flavour, request_: PlanRequest, compiled: list[str]
) -> None:
    first = obtain(flavour, request_)
    assert obtain(flavour, request_) == first == look_up(first.key)
    assert compiled == ["vae_decoder_first"]
    assert sha256_of(first.path) == first.sha256
    assert is_trusted(first.sha256)
    assert not is_trusted("0" * 64)


def test_two_fine_tunes_never_share_a_plan(
    flavour: Flavour, request_: PlanRequest, compiled: list[str]
) -> None:
    first, second = obtain(flavour, request_), obtain(flavour, fine_tuned(request_))
    assert len(compiled) == 2
    assert first.key != second.key
    assert first.path.read_bytes() != second.path.read_bytes()
    assert obtain(flavour, request_) == first


def test_a_damaged_plan_is_compiled_again(
    flavour: Flavour, request_: PlanRequest, compiled: list[str]
) -> None:
    entry = obtain(flavour, request_)
    whole = entry.path.read_bytes()
    for damaged in (whole[:-1], bytes([whole[0] ^ 1]) + whole[1:], b""):
        entry.path.write_bytes(damaged)
        assert look_up(entry.key) is None
        assert obtain(flavour, request_) == entry
        assert entry.path.read_bytes() == whole
    record = entry.path.with_name(f"{entry.key}.json")
    for nonsense in ("", "{}", "[1]", '{"sha256": 3}', '{"sha256": "../../plan"}'):
        record.write_text(nonsense)
        assert obtain(flavour, request_) == entry
    assert len(compiled) == 1 + 3 + 5


def test_nothing_unfinished_stays(flavour: Flavour, request_: PlanRequest) -> None:
    entry = obtain(flavour, request_)
    names = {path.name for path in (cache_folder() / "plans").iterdir()}
    assert names == {f"{entry.key}.json", f"{entry.sha256}.plan"}


def test_everything_that_changes_a_plan_changes_its_key(
    flavour: Flavour, request_: PlanRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other_graph = tmp_path / "other.onnx"
    other_graph.write_bytes(request_.graph.read_bytes() + b"\0")
    bound_one = dict(request_.baked)
    name, tensor = bound_one.popitem()
    reshaped = {**request_.baked, name: tensor.unsqueeze(0)}
    retyped = {**request_.baked, name: tensor.view(torch.float16)}
    requests = [
        request_,
        replace(request_, graph=other_graph),
        replace(request_, symbols={"h": (4, 4, 4), "w": (8, 8, 8)}),
        replace(request_, symbols={"h": (4, 4, 4), "w": (4, 4, 8)}),
        replace(request_, targets=("sm120",)),
        replace(request_, targets=("sm89", "sm120")),
        replace(request_, tf32=True),
        replace(request_, baked={}),
        replace(request_, baked=bound_one),
        replace(request_, baked=reshaped),
        replace(request_, baked=retyped),
        fine_tuned(request_),
    ]
    keys = [plan_key(flavour, request) for request in requests]
    monkeypatch.setattr(flavour, "version", "1.8.0")
    keys.append(plan_key(flavour, request_))
    monkeypatch.setattr(flavour, "name", "tensorrt")
    keys.append(plan_key(flavour, request_))
    monkeypatch.undo()
    monkeypatch.setattr(cache, "hash_code", lambda: "other code")
    keys.append(plan_key(flavour, request_))
    assert len(set(keys)) == len(keys)
    monkeypatch.undo()
    moved = tmp_path / "moved.onnx"
    moved.write_bytes(request_.graph.read_bytes())
    assert plan_key(flavour, replace(request_, graph=moved)) == keys[0]


def test_two_processes_may_compile_the_same_plan(
    flavour: Flavour, request_: PlanRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one finishes while this one compiles: both end with a whole plan."""
    build, other = cache.build_apart, []

    def build_while_another_does(*arguments: object) -> None:
        if not other:
            other.append(None)
            other[0] = obtain(flavour, request_)
        build(*arguments)

    monkeypatch.setattr(cache, "build_apart", build_while_another_does)
    entry = obtain(flavour, request_)
    assert isinstance(entry, Entry)
    assert entry == other[0] == look_up(entry.key)
