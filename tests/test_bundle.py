"""A bundle is read strictly: what is missing, altered, foreign, newer or elsewhere is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from wantrt.bundle import BUILD_LOG, MANIFEST, Bundle, describe_file
from wantrt.config import VARIANTS, Variant
from wantrt.errors import BuildError, BundleError
from wantrt.folder import locked, remembered_sha256, sha256_of, write_atomic, write_json
from wantrt.manifest import (
    CheckpointRecord,
    ComponentRecord,
    Manifest,
    PartRecord,
    TensorRecord,
    manifest_bytes,
)
from wantrt.records import from_plain, to_plain

GRAPH, WEIGHTS, MORE_WEIGHTS = (
    "graphs/dit_stack.onnx",
    "weights/t-1.safetensors",
    "weights/t-2.safetensors",
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bundle of three files. Loading reads no graph, so any bytes will do for one."""
    root = tmp_path / "bundle"
    (root / "graphs").mkdir(parents=True)
    (root / "weights").mkdir()
    (root / GRAPH).write_bytes(b"a graph")
    save_file({"a": torch.arange(6.0).reshape(2, 3)}, root / WEIGHTS)
    save_file({"b": torch.ones(5, dtype=torch.bfloat16)}, root / MORE_WEIGHTS)
    names = (GRAPH, WEIGHTS, MORE_WEIGHTS)
    manifest = Manifest(
        variant=VARIANTS["nano"],
        checkpoint=CheckpointRecord(fingerprint="0" * 64, layout="diffusers"),
        settings={"flow_shift": 3.0},
        parts={
            "text_encoder": PartRecord(precision="fp32", weights=()),
            "transformer": PartRecord(precision="fp32", weights=(WEIGHTS, MORE_WEIGHTS)),
            "vae": PartRecord(precision="fp32", weights=()),
        },
        components=(
            ComponentRecord(
                name="dit_stack",
                parts=("transformer",),
                inputs={"hidden": TensorRecord(dtype="float32", shape=("B", "L", 192))},
                outputs={"hidden_out": TensorRecord(dtype="float32", shape=("B", "L", 192))},
                stack=5,
                graph=GRAPH,
            ),
        ),
        files={name: describe_file(root / name) for name in names},
    )
    write_atomic(root / MANIFEST, manifest_bytes(manifest))
    return root


def edit_manifest(folder: Path, edit: Callable[[dict], None]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    edit(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_bundle_says_what_is_in_it(folder: Path) -> None:
    bundle = Bundle.load(folder)
    assert bundle.variant == VARIANTS["nano"]
    assert bundle.precision["transformer"] == "fp32"
    assert bundle.stack == {"dit_stack": 5}
    assert bundle.settings == {"flow_shift": 3.0}
    assert bundle.graph("dit_stack", "transformer") == folder / GRAPH
    bundle.check_hashes()


def test_weights_come_from_all_shards_and_are_mapped(folder: Path) -> None:
    weights = Bundle.load(folder).weights("transformer")
    assert torch.equal(weights["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(weights["b"], torch.ones(5, dtype=torch.bfloat16))


def test_mapped_weights_take_no_anonymous_memory(tmp_path: Path, folder: Path) -> None:
    save_file({"a": torch.ones(2**24)}, folder / WEIGHTS)  # 64 MiB
    edit_manifest(
        folder, lambda m: m["files"].update({WEIGHTS: to_plain(describe_file(folder / WEIGHTS))})
    )
    before = anonymous_bytes()
    tensor = Bundle.load(folder).weights("transformer")["a"]
    assert float(tensor.sum()) == 2**24
    assert anonymous_bytes() - before < 2**24


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_every_variant_survives_json(variant: Variant) -> None:
    assert from_plain(Variant, json.loads(json.dumps(to_plain(variant)))) == variant


@pytest.mark.parametrize(
    "path, value, message",
    [
        (
            ("variant", "experts", 0, "dit", "dim"),
            "192",
            r"variant.experts\[0\].dit.dim: expected int",
        ),
        (("variant", "vae", "latents_mean"), 1, "variant.vae.latents_mean: expected a list"),
        (("variant", "colour"), "red", "variant: unknown field colour"),
        (("files", GRAPH, "size"), None, "expected int, found null"),
        (("files", GRAPH, "size"), True, "expected int, found bool"),
        (("files",), 3, "files: expected an object"),
        (("components", 0, "inputs", "hidden", "shape"), [1.5], "expected int or str"),
        (("parts", "transformer", "precision"), 16, "expected str"),
    ],
    ids=str,
)
def test_manifest_of_another_form_is_refused(
    folder: Path, path: tuple, value: object, message: str
) -> None:
    def edit(manifest: dict) -> None:
        for key in path[:-1]:
            manifest = manifest[key]
        manifest[path[-1]] = value

    edit_manifest(folder, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.load(folder)


def test_manifest_without_a_needed_field_is_refused(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["variant"].pop("vae"))
    with pytest.raises(BundleError, match="variant: field vae is missing"):
        Bundle.load(folder)


@pytest.mark.parametrize(
    "path, value",
    [
        (("parts",), {}),
        (("parts", "vae", "precision"), "int8"),
        (("variant", "sizes"), []),
        (("variant", "experts"), []),
        (("variant", "boundary_ratios"), [0.9]),
        (("variant", "experts", 0, "dit", "num_heads"), 0),
        (("variant", "experts", 0, "dit", "num_heads"), 7),
        (("variant", "experts", 0, "dit", "num_layers"), 10**9),
        (("variant", "experts", 0, "dit", "dim"), 2 * 10**9),
        (("variant", "text_encoder", "num_heads"), 5),
        (("variant", "vae", "latents_std"), [1.0]),
        (("settings",), {"scheduler_config": 5}),
        (("settings",), {"scheduler_config": {"flow_shift": "a"}}),
    ],
)
def test_manifest_that_describes_nothing_is_refused(
    folder: Path, path: tuple[str | int, ...], value: object
) -> None:
    plain = json.loads((folder / MANIFEST).read_text())
    *parents, name = path
    record = plain
    for key in parents:
        record = record[key]
    record[name] = value
    (folder / MANIFEST).write_text(json.dumps(plain))
    with pytest.raises(BundleError, match="Build again"):
        Bundle.load(folder)


def test_newer_schema_says_upgrade(folder: Path) -> None:
    edit_manifest(folder, lambda m: m.update(schema=99, shape="unheard of"))
    with pytest.raises(BundleError, match=r"schema 99.*\n.*[Uu]pgrade"):
        Bundle.load(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": "1"}', "not json", "\x00"])
def test_what_is_no_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    with pytest.raises(BundleError, match="not a manifest"):
        Bundle.load(folder)


def test_missing_folder_and_unfinished_build_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.load(tmp_path / "nowhere")
    write_json(tmp_path / "half" / BUILD_LOG, {})
    with pytest.raises(BundleError, match="unfinished"):
        Bundle.load(tmp_path / "half")


@pytest.mark.parametrize("name", [GRAPH, WEIGHTS])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(BundleError, match=f"lacks {name}"):
        Bundle.load(folder)


def test_altered_graph_is_found_at_load(folder: Path) -> None:
    flip_last_byte(folder / GRAPH)
    with pytest.raises(BundleError, match=r"dit_stack.onnx is not as it was built: sha256"):
        Bundle.load(folder)


def test_truncated_weights_are_found_at_load(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(BundleError, match="bytes instead of"):
        Bundle.load(folder)


def test_altered_header_is_found_at_load(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content.replace(b'"a"', b'"z"'))
    with pytest.raises(BundleError, match="the header differs"):
        Bundle.load(folder)


def test_header_that_claims_gigabytes_is_refused(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(BundleError, match="claims 1099511627776 bytes"):
        Bundle.load(folder)


def test_altered_weights_are_found_by_hashes_and_only_there(folder: Path) -> None:
    flip_last_byte(folder / WEIGHTS)
    bundle = Bundle.load(folder)
    with pytest.raises(BundleError, match=f"sha256 differs: {WEIGHTS}"):
        bundle.check_hashes()


@pytest.mark.parametrize("name", ["graphs/extra.onnx", "weights/deep/extra.safetensors"])
def test_foreign_file_is_named(folder: Path, name: str) -> None:
    write_atomic(folder / name, b"who put me here")
    with pytest.raises(BundleError, match=f"does not know: {name}"):
        Bundle.load(folder)


def test_other_files_beside_the_manifest_are_nobodys_business(folder: Path) -> None:
    (folder / "README.md").write_text("my first bundle")
    Bundle.load(folder)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "graphs/../../secret", "secret", "graphs//x", "", "..\\x"]
)
def test_paths_stay_in_the_folder(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"a graph")

    def edit(manifest: dict) -> None:
        manifest["files"][name] = manifest["files"].pop(GRAPH)
        manifest["components"][0]["graph"] = name

    edit_manifest(folder, edit)
    with pytest.raises(BundleError, match="outside of its folders"):
        Bundle.load(folder)


def test_links_are_not_followed(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    shutil.move(folder / GRAPH, elsewhere)
    (folder / GRAPH).symlink_to(elsewhere)
    with pytest.raises(BundleError, match="is a link"):
        Bundle.load(folder)


def test_linked_folders_are_not_followed(folder: Path) -> None:
    shutil.move(folder / "weights", folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        Bundle.load(folder)


def test_a_bundle_may_itself_lie_behind_a_link(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder)
    Bundle.load(folder.parent / "link")


def test_bundle_without_weights_or_tokenizer_says_so(folder: Path) -> None:
    edit_manifest(folder, lambda m: m["parts"]["transformer"].update(weights=[]))
    bundle = Bundle.load(folder)
    with pytest.raises(BundleError, match="--no-weights"):
        bundle.weights("transformer")
    with pytest.raises(BundleError, match="no tokenizer"):
        _ = bundle.tokenizer


def test_two_builds_exclude_each_other(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "b"),
        pytest.raises(BuildError, match=f"pid {os.getpid()}"),
        locked(tmp_path / "b"),
    ):
        pass
    with locked(tmp_path / "b"):
        pass
    assert list((tmp_path / "b").iterdir()) == []


def test_hashes_are_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1234")
    os.utime(path, ns=(10**18, 10**18))
    assert remembered_sha256(path) == sha256_of(path)
    reads: list[int] = []
    remembered_sha256(path, lambda what, done, total: reads.append(done))
    assert reads == []
    path.write_bytes(b"4321")
    assert remembered_sha256(path) == sha256_of(path)
