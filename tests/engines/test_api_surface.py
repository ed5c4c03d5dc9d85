"""What our code uses of TensorRT exists in the real bindings of both flavours.

Use ⊆ declared: engines/api.py and `Module` in engines/flavours.py say what we use, and mypy refuses
the rest. Declared ⊆ real: looked up here. The bindings of the full TensorRT need its libraries only
to work, not to be looked at: stubs let them import.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.engines.stubs import make_stubs, run_on_stubs

ROOT = Path(__file__).resolve().parents[2]
DECLARED_IN = (ROOT / "engines" / "api.py", ROOT / "engines" / "flavours.py")
ONE_FLAVOUR = {"RTX": "tensorrt_rtx", "Full": "tensorrt"}  # begins what only one of them has
REAL_NAMES = {"Engine": "ICudaEngine", "Severity": "ILogger.Severity", "Enum": "LayerType"}
MODULE = "Module"
BUFFER = "__buffer__"  # Python's own name for the buffer protocol, from 3.12 on
DUMP = """
import importlib, json, sys
module = importlib.import_module(sys.argv[1])
found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
found["ILogger.Severity"] = module.ILogger.Severity
modules = {"Module": module}
if sys.argv[1] == "tensorrt_bindings":  # of the other one, tensorrt_rtx.plugin is empty
    sys.modules["tensorrt"] = module
    modules["PluginModule"] = importlib.import_module("tensorrt_bindings.plugin")
    plugin = vars(modules["PluginModule"])
    found.update({name: plugin[name] for name in plugin["__all__"]})
surface = {name: dir(value) for name, value in {**found, **modules}.items()}
print(json.dumps({**surface, "version": [module.__version__]}))
"""

Members = dict[str, list[str]]  # class -> members


def declared_members(*sources: str) -> tuple[Members, Members]:
    """What each protocol declares itself, and the protocols that it extends."""
    members: Members = {}
    bases: Members = {}
    for source in sources:
        for node in ast.parse(source).body:
            names = [ast.unparse(base) for base in getattr(node, "bases", ())]
            if not isinstance(node, ast.ClassDef) or "Protocol" not in names:
                continue
            own = [item.name for item in node.body if isinstance(item, ast.FunctionDef)]
            own += [ast.unparse(a.target) for a in node.body if isinstance(a, ast.AnnAssign)]
            members[node.name] = own
            bases[node.name] = [name for name in names if name != "Protocol"]
    return members, bases


def problems(members: Members, full: Members, rtx: Members) -> list[str]:
    """Whatever is declared and not there; or declared for one flavour and there in both."""
    found = []
    for protocol, names in members.items():
        only = next((ONE_FLAVOUR[p] for p in ONE_FLAVOUR if protocol.startswith(p)), None)
        for name in names:
            if name == BUFFER:
                continue
            for flavour, surface in (("tensorrt_rtx", rtx), ("tensorrt", full)):
                has = name in real_class(protocol, surface)
                if not has and only in (flavour, None):
                    found.append(f"{flavour} has no {protocol}.{name}")
                if has and only not in (flavour, None):
                    found.append(f"{flavour} has {protocol}.{name} too: no probe is needed")
    return found


def common_name(protocol: str) -> str:
    for prefix in ONE_FLAVOUR:
        protocol = protocol.removeprefix(prefix)
    return protocol


def real_class(protocol: str, surface: Members) -> list[str]:
    name = common_name(protocol)
    name = REAL_NAMES.get(name, name)
    return surface.get(f"I{name}", surface.get(name, []))


@pytest.fixture(scope="module")
def rtx() -> Members:
    pytest.importorskip("tensorrt_rtx")
    return run_on_stubs("-c", DUMP, "tensorrt_rtx")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Members:
    libraries = make_stubs(tmp_path_factory.mktemp("stubs"))
    return run_on_stubs("-c", DUMP, "tensorrt_bindings", libraries=libraries)


@pytest.fixture(scope="module")
def declared() -> Members:
    members, _ = declared_members(*(path.read_text() for path in DECLARED_IN))
    return members


def test_both_flavours_have_what_we_use(declared, full, rtx):
    assert full["version"][0].startswith("11.")
    assert not problems(declared, full, rtx)


def test_the_declarations_are_read(declared):
    assert len(declared) > 25
    assert sum(len(names) for names in declared.values()) > 80
    assert "set_tensor_address" in declared["ExecutionContext"]
    assert "max_aux_streams" in declared["BuilderConfig"]
    assert {"Builder", "Runtime", "OnnxParser"} <= set(declared[MODULE])
    assert {"register", "autotune", "aot_impl", "from_shape_expr"} <= set(
        declared["FullPluginModule"]
    )


@pytest.mark.parametrize(
    "protocol, extra, expected",
    [
        ("ExecutionContext", "run_it", ["tensorrt_rtx has no", "tensorrt has no"]),
        ("ExecutionContext", "is_stream_capturable", ["tensorrt has no"]),
        ("Builder", "build_engine_with_config", ["tensorrt_rtx has no"]),
        ("LayerType", "MULTI_HEAD_ATTENTION", ["tensorrt_rtx has no", "tensorrt has no"]),
        ("RTXExecutionContext", "set_aux_streams", ["tensorrt has RTXExecutionContext"]),
        ("FullPluginModule", "launch", ["tensorrt has no"]),
        ("FullTensorDesc", "data_ptr", ["tensorrt has no"]),
        ("FullNetworkDefinitionCreationFlag", "STRONGLY_TYPED", ["tensorrt_rtx has Full"]),
        ("Module", "ComputeCapability", ["tensorrt has no"]),
        ("NoSuchClass", "x", ["tensorrt_rtx has no", "tensorrt has no"]),
    ],
)
def test_a_wrong_declaration_is_reported(declared, full, rtx, protocol, extra, expected):
    wrong = {**declared, protocol: [*declared.get(protocol, []), extra]}
    found = problems(wrong, full, rtx)
    assert len(found) == len(expected)
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning)
        assert extra in line


def test_probes_tell_the_flavours_apart(full, rtx):
    tree = ast.parse(DECLARED_IN[1].read_text())
    probes = {
        ast.literal_eval(node.args[1])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"
    }
    assert len(probes) > 4
    for probe in probes:
        in_rtx, in_full = (
            any(probe in members for members in surface.values()) for surface in (rtx, full)
        )
        assert in_rtx != in_full, probe


def test_protocols_for_one_flavour_extend_the_common_ones():
    _, bases = declared_members(*(path.read_text() for path in DECLARED_IN))
    for protocol, extended in bases.items():
        common = common_name(protocol)
        expected = [common] if common != protocol and common in bases else []
        assert extended == expected, protocol


# -- Nothing goes around the declarations ---------------------------------------------------------


def product_modules() -> list[Path]:
    folders = ("wantrt", "export", "kernels", "engines", "bench")
    return sorted(
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
        if folder != "wantrt" or not any(parent.is_symlink() for parent in path.parents)
    )


def imported_modules(tree: ast.AST) -> set[str]:
    """Also those that are named in a string, which import_module could be given."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        if isinstance(node, ast.Constant) and node.value in ("tensorrt_rtx", "tensorrt_bindings"):
            found.add(node.value)
    return {name for name in found if name.split(".")[0].startswith("tensorrt")}


def test_one_file_imports_tensorrt():
    importing = {
        str(path.relative_to(ROOT))
        for path in product_modules()
        if imported_modules(ast.parse(path.read_text()))
    }
    assert importing == {"engines/flavours.py"}
    assert imported_modules(ast.parse("def f():\n    import tensorrt_rtx as trt")) == {
        "tensorrt_rtx"
    }


def test_no_other_file_of_engines_leaves_the_types():
    """`Any`, getattr, hasattr, a cast or an ignored error could use what is not declared."""
    for path in sorted((ROOT / "engines").glob("*.py")):
        source = path.read_text()
        names = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
        if path.name != "flavours.py":
            assert not names & {"Any", "getattr", "hasattr", "cast"}, path
        assert "type: ignore" not in source, path


def test_the_bindings_do_not_pass_for_tensorrt():
    """They are installed for this test; the runtime needs the libraries too."""
    if find_spec("tensorrt_libs") is not None:
        pytest.skip("TensorRT itself is installed")
    assert find_spec("tensorrt") is None
