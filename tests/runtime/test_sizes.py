"""Sizes that plans serve: said in the user's words, taken as defaults, added by a command."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.small import small_bundle
from wantrt.bundle import Bundle
from wantrt.config import Size
from wantrt.engines.requests import plan_shapes
from wantrt.errors import SettingsError
from wantrt.manifest import PlanRecord
from wantrt.runtime.sizes import check_served, dit_symbols, resolve_for, served_sizes

RUNTIME = "tensorrt-rtx"


def bundle_for(sizes: list[Size], frames: list[int], dynamic: bool = False) -> Bundle:
    """The small bundle with records of the plans that `wantrt build` would make."""
    bundle = Bundle.load(small_bundle())
    components = []
    for component in bundle.manifest.components:
        shapes = plan_shapes(bundle.variant, component.name, sizes, frames, dynamic)
        plans = tuple(
            PlanRecord(
                file=f"plans/{component.name}-{i}.plan",
                runtime=RUNTIME,
                version="1.7",
                targets=("sm89",),
                symbols=dict(shape.symbols),
            )
            for i, shape in enumerate(shapes)
        )
        components.append(replace(component, plans=plans))
    return replace(bundle, manifest=replace(bundle.manifest, components=tuple(components)))


def test_what_is_served_is_said_as_users_say_it() -> None:
    bundle = bundle_for([(64, 48), (832, 480)], [5, 81])
    assert [str(served) for served in served_sizes(bundle, RUNTIME)] == [
        "64x48 with 5 frames",
        "64x48 with 81 frames",
        "832x480 with 5 frames",
        "832x480 with 81 frames",
    ]
    assert served_sizes(bundle, "torch") == []
    dynamic = bundle_for([(64, 48), (832, 480)], [5, 81], dynamic=True)
    assert str(served_sizes(dynamic, RUNTIME)[0]) == (
        "from 64x48 with 5 frames to 832x480 with 81 frames"
    )


def test_a_size_without_a_plan_names_those_with_one_and_the_command() -> None:
    bundle = bundle_for([(64, 48)], [5])
    with pytest.raises(SettingsError) as refused:
        resolve_for(bundle, RUNTIME, prompt="a cat", size=(832, 480), num_frames=81)
    message = str(refused.value)
    assert "do not serve 832x480 with 81 frames" in message
    assert "They serve 64x48 with 5 frames." in message
    assert f"--out {bundle.path} --runtime tensorrt-rtx --size 832x480 --frames 81" in message
    assert resolve_for(bundle, "torch", prompt="a cat", size=(832, 480), num_frames=81)


def test_all_of_a_video_must_be_served() -> None:
    """Tokens alone are not enough: 48x64 has as many as 64x48."""
    bundle = bundle_for([(64, 48)], [5])
    for size, frames in (((48, 64), 5), ((64, 48), 9)):
        with pytest.raises(SettingsError, match="do not serve"):
            resolve_for(bundle, RUNTIME, prompt="a cat", size=size, num_frames=frames)


def test_guidance_needs_a_plan_of_its_own() -> None:
    bundle = bundle_for([(64, 48)], [5])
    alone = [
        replace(c, plans=tuple(p for p in c.plans if p.symbols.get("B") != (2, 2, 2)))
        for c in bundle.manifest.components
    ]
    bundle = replace(bundle, manifest=replace(bundle.manifest, components=tuple(alone)))
    unguided = resolve_for(bundle, RUNTIME, prompt="x", guidance_scale=1.0)
    check_served(bundle, RUNTIME, unguided)
    with pytest.raises(SettingsError, match="and guidance"):
        resolve_for(bundle, RUNTIME, prompt="x", guidance_scale=5.0)


def test_the_default_size_is_one_that_is_served() -> None:
    bundle = bundle_for([(64, 48), (832, 480)], [5, 9])
    default = (bundle.variant.size, bundle.variant.num_frames)

    def chosen(bundle: Bundle, runtime: str = RUNTIME, **given: object) -> tuple[Size, int]:
        settings = resolve_for(bundle, runtime, prompt="a cat", **given)
        return settings.size, settings.num_frames

    assert chosen(bundle, "torch") == default
    assert chosen(bundle) == ((64, 48), 5)
    assert chosen(bundle, num_frames=9) == ((64, 48), 9)
    assert chosen(bundle, size=(832, 480)) == ((832, 480), 5)
    assert chosen(bundle_for([(64, 48), default[0]], [5, default[1]])) == default


def test_two_passes_are_a_batch_where_tokens_are_few() -> None:
    variant = Bundle.load(small_bundle()).variant
    assert dit_symbols(variant, (832, 480), 81, guided=True)["B"] == 2  # 32,760 tokens
    assert dit_symbols(variant, (848, 480), 81, guided=True)["B"] == 1
    assert dit_symbols(variant, (64, 48), 5, guided=False)["B"] == 1


def test_a_bundle_without_plans_serves_every_size(tmp_path: Path) -> None:
    bundle = Bundle.load(small_bundle())
    assert served_sizes(bundle, RUNTIME) == []
    assert resolve_for(bundle, "torch", prompt="x", size=(1280, 720)).size == (1280, 720)
