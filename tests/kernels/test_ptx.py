"""Every plugin as PTX: for every GPU, at the sizes of real models, compiled here without a GPU.

What is demanded: TensorRT's arguments and no others; tensors read and written 128 bits at a time,
and narrower only what a program reads once (a token's row, a coefficient); no scratch memory, no
register spilled; PTX that the drivers of CUDA 12.8 and later read. The compiler's
cache is an empty folder, so nothing here was compiled before.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from tests.kernels.compiler import empty_cache, stop_compiler  # noqa: F401  a fixture
from tests.kernels.plugin_cases import BATCH, PROGRAMS, TOKENS, WIDTHS, make_node
from wantrt.errors import BuildError
from wantrt.kernels import ptx as ptx_module
from wantrt.kernels.aot import FLOAT32, Binding, Launch, Operand, Plugin
from wantrt.kernels.nodes import PLUGINS
from wantrt.kernels.ptx import PTX_VERSIONS, Kernel, Source, compile_kernel
from wantrt.kernels.ptx_compiler import (
    RefusedError,
    assemble,
    compile_source,
    remove_hidden_parameters,
)
from wantrt.linked import __file__ as a_source

BF16 = torch.bfloat16
ACCESS = re.compile(r"\b(?:ld|st)\.global[.:\w]*?(?:\.v(\d))?\.[bufs](\d+)\b")
NARROW = {  # how many values of 16 to 64 bits a thread may read beside its vectors
    "GuideAndStep": 6,  # the index, four coefficients, the scale
    "RmsSilu": 32,  # gamma: one for each of its channels
}
GPUS = (80, 86, 89, 90, 100, 120)  # one of each kind; the rest differ in name
TYPES = {"*": ".u64", "i": ".u32"}


pytestmark = pytest.mark.usefixtures("empty_cache")


def bind(name: str, width: str = "1.3B", dtype: torch.dtype = BF16) -> Binding:
    return PLUGINS[name].bind(*make_node(name, width, dtype))


def parameters(ptx: str) -> list[str]:
    """The types of the entry's parameters."""
    (entry,) = re.findall(r"\.entry \w+\((.*?)\n\)", ptx, re.DOTALL)
    return re.findall(r"\.param (\.\w+)", entry)


def access_bits(ptx: str) -> list[int]:
    """How wide each access to global memory is."""
    return [int(count or 1) * int(bits) for count, bits in ACCESS.findall(ptx)]


def check(name: str, source: Source, sm: int) -> None:
    kernel = compile_kernel(source, sm)
    plugin, ptx = PLUGINS[name], kernel.ptx
    expected = [TYPES[kind[0]] for _, kind in source.types]
    assert len(expected) == len(plugin.inputs) + len(plugin.outputs) + expected.count(".u32")
    assert parameters(ptx) == expected
    widths = access_bits(ptx)
    narrow = [bits for bits in widths if bits < 128]
    assert len(narrow) <= NARROW.get(name, 0) + ("token_row" in plugin.inputs)
    assert set(widths) - set(narrow) == {128}
    assert len(widths) - len(narrow) >= len(plugin.outputs) + 1
    assert f".version {PTX_VERSIONS[sm] // 10}.{PTX_VERSIONS[sm] % 10}\n" in ptx
    assert f".target sm_{sm}{'a' if sm >= 90 else ''}\n" in ptx
    assert f".reqntid {kernel.num_threads}\n" in ptx
    assert ptx.count(f".visible .entry {kernel.name}(") == 1
    assert str(Path(a_source).parents[1]) not in ptx
    assert re.findall(r"(\d+) bytes spill stores", assemble(ptx, sm)) == ["0"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "width, dtype", [*((width, BF16) for width in WIDTHS), ("1.3B", torch.float16)], ids=str
)
@pytest.mark.parametrize("name", PLUGINS)
def test_every_width_and_dtype(name: str, width: str, dtype: torch.dtype) -> None:
    check(name, bind(name, width, dtype).source, 90)


@pytest.mark.slow
@pytest.mark.parametrize("sm", [sm for sm in GPUS if sm != 90])
@pytest.mark.parametrize("name", PLUGINS)
def test_every_gpu(name: str, sm: int) -> None:
    check(name, bind(name).source, sm)


@pytest.mark.parametrize("name", PLUGINS)
def test_grid(name: str) -> None:
    """As many programs as the launcher of the op starts: mostly one a token."""
    binding = bind(name)
    programs = 1
    for size in binding.grid:
        programs *= size
    assert programs == PROGRAMS.get(name, BATCH * TOKENS)
    assert len(binding.scalars) == sum(kind == "i32" for _, kind in binding.source.types)


# -- What would go wrong without each of the measures ----------------------------------------------


@pytest.mark.parametrize("name", ["Modulate", "QkNormRope"])
def test_pointers_are_said_to_be_aligned(name: str) -> None:
    """Else every value is read by itself, eight times as often."""
    source = bind(name).source
    check(name, source, 90)
    unaligned = replace(source, aligned=())
    assert 128 not in access_bits(compile_kernel(unaligned, 90).ptx)


def test_strides_are_said_to_be_multiples_of_16() -> None:
    """Else what they lead to is read value by value."""
    source = bind("Modulate").source
    assert {"batch_stride", "row_stride"} <= set(source.aligned)
    pointers = tuple(name for name in source.aligned if name.endswith("_ptr"))
    kernel = compile_kernel(replace(source, aligned=pointers), 90)
    assert 32 in access_bits(kernel.ptx)


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)  # of the velocities
def test_what_is_written_in_place_was_read_by_all_threads(dtype: torch.dtype) -> None:
    """The thread that writes an element need not be the one that reads it."""
    ptx = compile_kernel(bind("GuideAndStep", dtype=dtype).source, 90).ptx
    (barrier, *_) = (match.start() for match in re.finditer(r"\bbar(rier)?\.", ptx))
    assert ptx.rindex("ld.global") < barrier < ptx.index("st.global")


@pytest.mark.parametrize(
    "name, loads_before", [("QkNormRope", 12), ("RmsNorm", 4), ("Modulate", 4)]
)
def test_what_a_cache_holds_is_read_after_the_sum_over_a_row(name: str, loads_before: int) -> None:
    """So it takes no registers before, and memory is waited for once: for x, with its angles."""
    ptx = compile_kernel(bind(name, "14B").source, 90).ptx
    before, after = (
        re.findall(r"ld\.global\S*", part)
        for part in re.split(r"\bbar(?:rier)?\.", ptx, maxsplit=1)
    )
    assert len(before) == loads_before
    assert not any("evict_last" in load for load in before)
    assert all("evict_last" in load for load in after)


def test_a_stride_that_is_no_multiple_of_16_is_not_said_to_be() -> None:
    plugin = PLUGINS["Modulate"]
    inputs, attributes = make_node("Modulate", "1.3B", BF16)
    odd = {name: Operand((*t.shape[:2], 97), t.dtype) for name, t in inputs.items()}
    assert "row_stride" not in plugin.bind(odd, attributes).source.aligned


def triton_ptx(source: Source, sm: int, **options: object) -> str:
    """As Triton makes it if it is not told otherwise."""
    from importlib import import_module

    kernel = getattr(import_module(source.module), source.kernel)
    constants = dict(source.constants)
    types = dict(source.types)
    absent = {name: None for name in kernel.arg_names if name not in {**types, **constants}}
    compiled = triton.compile(
        triton.compiler.ASTSource(
            kernel,
            {name: types.get(name, "constexpr") for name in kernel.arg_names},
            {**constants, **absent},
        ),
        target=triton.backends.compiler.GPUTarget("cuda", sm, 32),
        options=options,
    )
    return compiled.asm["ptx"]


def test_parameters_that_only_triton_passes_are_gone() -> None:
    """Triton's own PTX has two pointers more, and TensorRT would not pass them."""
    source = bind("Modulate").source
    raw = triton_ptx(source, 90, ptx_version=86, enable_fp_fusion=True)
    types = [kind for _, kind in source.types]
    assert len(parameters(raw)) > len(types)
    stripped = remove_hidden_parameters(raw, types)
    assert parameters(stripped) == [TYPES[kind[0]] for kind in types]
    assert len(raw.splitlines()) - len(stripped.splitlines()) == len(parameters(raw)) - len(types)
    assemble(stripped, 90)


def test_a_parameter_that_is_used_is_not_removed() -> None:
    source = bind("Modulate").source
    ptx = compile_kernel(source, 90).ptx
    types = [kind for _, kind in source.types]
    with pytest.raises(RefusedError, match=r"uses .*_param_6, which nobody passes"):
        remove_hidden_parameters(ptx, types[:-1])
    with pytest.raises(RefusedError, match="has 7 parameters for 8 arguments"):
        remove_hidden_parameters(ptx, [*types, "*fp32"])
    with pytest.raises(RefusedError, match=r"takes .param .u32 .*_param_3 for .* type \*bf16"):
        remove_hidden_parameters(ptx, [*types[:3], "*bf16", *types[4:]])


def test_a_crash_of_the_compiler_is_an_error_that_names_the_kernel() -> None:
    """And the next request is served."""
    crash = replace(spoiled("any_kernel"), module="tests.kernels.crashing")
    with pytest.raises(BuildError) as caught:
        compile_kernel(crash, 90)
    message = str(caught.value)
    assert "Triton crashed on the kernel any_kernel for sm90" in message
    assert "something like LLVM ERROR" in message
    assert "exit status -6" in message
    check("Modulate", bind("Modulate").source, 120)


def test_sm120_has_no_ptx_as_old_as_others() -> None:
    """Asked for it, LLVM ends the process; an older one leaves it to the assembler to refuse."""
    with pytest.raises(BuildError, match="modulate_kernel for sm120"):
        ptx_module._ask(bind("Modulate").source, 120, 86)
    check("Modulate", bind("Modulate").source, 120)


def test_drivers_of_other_versions_read_the_ptx() -> None:
    """Triton's own choice is as new as its assembler: too new for most drivers of CUDA 13."""
    assert max(PTX_VERSIONS.values()) <= 88
    ours = compile_kernel(bind("Modulate").source, 90).ptx
    chosen = triton_ptx(bind("Modulate").source, 90, enable_fp_fusion=True)
    version = re.compile(r"\.version (\d+\.\d+)")
    assert float(version.findall(chosen)[0]) > float(version.findall(ours)[0]) == 8.6


def test_ptx_of_hopper_and_later_is_for_one_gpu() -> None:
    """So plans with plugins are not portable, and each GPU has its own."""
    kernel = compile_kernel(bind("Modulate").source, 90)
    with pytest.raises(RefusedError, match="refuses its PTX"):
        assemble(kernel.ptx, 100)
    with pytest.raises(BuildError, match=r"not for sm75: build without plugins"):
        compile_kernel(bind("Modulate").source, 75)


def test_the_environment_does_not_change_the_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor another process and another empty cache: equal bytes, with products fused into sums."""
    source = bind("Modulate").source
    before = compile_kernel(source, 90)
    assert "fma.rn" in before.ptx
    stop_compiler()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_FORCE_DISABLE_FP_FUSION", "1")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "0")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        assert compile_kernel(source, 90) == before
    finally:
        stop_compiler()


def test_fusing_products_into_sums_is_not_left_to_a_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It differs between versions of Triton. Here, in this process, it is off."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    source = bind("Modulate").source
    assert "fma.rn" not in triton_ptx(source, 90, ptx_version=86)
    assert "fma.rn" in compile_source(source, 90, 86).ptx


def test_other_code_has_another_name() -> None:
    """One plan holds several kernels of one function."""
    names = {
        compile_kernel(bind("Modulate", dtype=dtype).source, sm).name
        for dtype in (BF16, torch.float16)
        for sm in (80, 90)
    }
    assert len(names) == 4
    assert all(re.fullmatch(r"wantrt_modulate_kernel_[0-9a-f]{16}", name) for name in names)


def spoiled(kernel: str) -> Source:
    return Source(
        module="tests.kernels.spoiled",
        kernel=kernel,
        types=(("x_ptr", "*fp32"), ("out_ptr", "*fp32")),
        constants=(("SIZE", 128),),
        aligned=("x_ptr", "out_ptr"),
        num_warps=4,
    )


@pytest.mark.parametrize(
    "kernel, reason",
    [
        ("scratch_kernel", "bytes of scratch memory"),
        ("shared_kernel", r"wants \d+ bytes of shared memory, of 49152"),
        ("wrong_kernel", "CompilationError"),
        ("missing_kernel", "has no attribute"),
    ],
)
def test_what_cannot_be_a_plugin_is_refused(kernel: str, reason: str) -> None:
    with pytest.raises(BuildError, match=reason) as caught:
        compile_kernel(spoiled(kernel), 90)
    assert f"the kernel {kernel} for sm90" in str(caught.value)


def test_an_answer_that_nobody_waited_for_is_not_taken_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = bind("Modulate").source, bind("RmsNorm").source
    compiler = type(ptx_module._compilers[os.getpid()])

    def interrupted(self: object, *request: object) -> Kernel:
        self._socket.send(request)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ptx_module._ask(first, 90, 86)
    assert "rms_norm" in ptx_module._ask(second, 90, 86).name


# -- The description -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLUGINS)
def test_dtypes_that_no_kernel_is_for_are_refused(name: str) -> None:
    plugin = PLUGINS[name]
    inputs, attributes = make_node(name, "1.3B", BF16)
    for wrong, operand in inputs.items():
        spoilt = {**inputs, wrong: Operand(operand.shape, torch.float64)}
        with pytest.raises(BuildError, match=f"plugin {name}: {wrong} is torch.float64, expected"):
            plugin.bind(spoilt, attributes)
    for wrong in attributes:
        lacking = {key: value for key, value in attributes.items() if key != wrong}
        with pytest.raises(BuildError, match=f"plugin {name}: {wrong} is None, expected"):
            plugin.bind(inputs, lacking)


def test_channels_cannot_be_dynamic() -> None:
    inputs, attributes = make_node("Modulate", "1.3B", BF16)
    dynamic = {name: Operand((2, 64, object()), each.dtype) for name, each in inputs.items()}
    with pytest.raises(BuildError, match="number of channels must be known"):
        PLUGINS["Modulate"].bind(dynamic, attributes)
    with pytest.raises(BuildError, match="ONNX data type 11"):
        PLUGINS["Modulate"].bind(inputs, {**attributes, "dtype": 11})


def test_a_kernel_takes_inputs_scalars_and_outputs_in_this_order() -> None:
    from tests.kernels.spoiled import disordered_kernel

    plugin = Plugin(
        name="Disordered",
        kernel=disordered_kernel,
        inputs={"x": FLOAT32},
        outputs=("out",),
        attributes={},
        infer=lambda inputs, node: (inputs["x"],),
        launch=lambda inputs, node: Launch(grid=(1,), constants={"SIZE": 16}, scalars={}),
    )
    with pytest.raises(AssertionError, match="Disordered: "):
        plugin.bind({"x": Operand((4,), torch.float32)}, {})
