"""What each torch function that the models use is in ONNX (opset `OPSET`).

An emitter takes the tracer, the specs of the results and the torch function's own arguments, and
returns the name of the result's value in the graph, or a list of names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wantrt.export.tracing import ONNX_DTYPE, Emitter, Spec, Traced, Tracer
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

EMITTERS: dict[str, Emitter] = {}
FUSED_HEAD_DIM = 256  # the widest head that fused attention kernels take


def emits(*names: str) -> Callable[[Emitter], Emitter]:
    """Register the ONNX spelling of torch functions, by their names in torch."""

    def register(emitter: Emitter) -> Emitter:
        EMITTERS.update(dict.fromkeys(names, emitter))
        return emitter

    return register


# -- Arithmetic, in the dtype that torch promotes to ----------------------------------------------


def _arithmetic(op_type: str, reverse: bool = False) -> Emitter:
    def emit(t: Tracer, out: list[Spec], /, a: Tensor | float, b: Tensor | float) -> str:
        left, right = (b, a) if reverse else (a, b)
        return t.node(op_type, t.read(left, out[0].dtype), t.read(right, out[0].dtype))

    return emit


for _op_type, _name in (("Add", "add"), ("Sub", "sub"), ("Mul", "mul"), ("Div", "truediv")):
    EMITTERS[f"__{_name}__"] = EMITTERS[_name] = _arithmetic(_op_type)
    EMITTERS[f"__r{_name}__"] = _arithmetic(_op_type, reverse=True)
EMITTERS["div"] = EMITTERS["truediv"]
EMITTERS["rsub"] = EMITTERS["__rsub__"]


@emits("float")
def _float(t: Tracer, out: list[Spec], /, x: Traced) -> str:
    return t.read(x, torch.float32)


@emits("to")
def _to(t: Tracer, out: list[Spec], /, x: Traced, dtype: torch.dtype) -> str:
    return t.read(x, dtype)


@emits("clamp")
def _clamp(t: Tracer, out: list[Spec], /, x: Traced, low: float, high: float) -> str:
    dtype = out[0].dtype
    return t.node("Clip", x.value, t.read(low, dtype), t.read(high, dtype))


@emits("silu")
def _silu(t: Tracer, out: list[Spec], /, x: Traced, inplace: bool = False) -> str:
    return t.node("Mul", x.value, t.node("Sigmoid", x.value))


@emits("gelu")
def _gelu(t: Tracer, out: list[Spec], /, x: Traced, approximate: str = "none") -> str:
    return t.node("Gelu", x.value, approximate=approximate)


# -- Shapes ---------------------------------------------------------------------------------------


@emits("unflatten")
def _unflatten(t: Tracer, out: list[Spec], /, x: Traced, dim: int, sizes: Sequence[int]) -> str:
    """Sizes that are constants anyway are written as such, which leaves −1 for one that is not."""
    dim %= len(x.spec.shape)
    known = out[0].shape[dim : dim + len(sizes)]
    split = [size if fixed is None else fixed for size, fixed in zip(sizes, known, strict=True)]
    return t.reshape(x.value, [*_kept(x, dim), *split, *t.sizes(x, dim + 1)])


@emits("flatten")
def _flatten(
    t: Tracer, out: list[Spec], /, x: Traced, start_dim: int = 0, end_dim: int = -1
) -> str:
    rank = len(x.spec.shape)
    start, end = start_dim % rank, end_dim % rank
    merged = out[0].shape[start]
    sizes = [*_kept(x, start), -1 if merged is None else merged, *t.sizes(x, end + 1)]
    return t.reshape(x.value, sizes)


def _kept(x: Traced, axes: int) -> list[int]:
    """The first sizes of x as Reshape wants them where they stay: 0 copies a dynamic one."""
    return [size or 0 for size in x.spec.shape[:axes]]


@emits("view")
def _view(t: Tracer, out: list[Spec], /, x: Traced, *sizes: int) -> str:
    known = zip(sizes, out[0].shape, strict=True)
    return t.reshape(
        x.value, [size if fixed is None or size == -1 else fixed for size, fixed in known]
    )


@emits("contiguous")
def _contiguous(t: Tracer, out: list[Spec], /, x: Traced) -> str:
    """How a value lies in memory is the runtime's affair."""
    return x.value


@emits("unsqueeze")
def _unsqueeze(t: Tracer, out: list[Spec], /, x: Traced, dim: int) -> str:
    return t.node("Unsqueeze", x.value, t.integers([dim]))


@emits("expand")
def _expand(t: Tracer, out: list[Spec], /, x: Traced, *sizes: int) -> str:
    """−1 keeps a size, which ONNX writes as 1."""
    kept = [1 if size == -1 else size for size in sizes]
    return t.node("Expand", x.value, t.vector(kept))


@emits("zeros_like")
def _zeros_like(t: Tracer, out: list[Spec], /, x: Traced) -> str:
    return t.node("Expand", t.read(0.0, out[0].dtype), t.vector(t.sizes(x)))


@emits("permute")
def _permute(t: Tracer, out: list[Spec], /, x: Traced, *dims: int) -> str:
    return t.node("Transpose", x.value, perm=dims)


@emits("transpose")
def _transpose(t: Tracer, out: list[Spec], /, x: Traced, dim0: int, dim1: int) -> str:
    perm = list(range(len(x.spec.shape)))
    perm[dim0], perm[dim1] = perm[dim1], perm[dim0]
    return t.node("Transpose", x.value, perm=perm)


@emits("chunk")
def _chunk(t: Tracer, out: list[Spec], /, x: Traced, chunks: int, dim: int = 0) -> list[str]:
    sizes = t.integers([spec.shape[dim] or 0 for spec in out])
    axis = dim % len(x.spec.shape)
    return t.multi_node("Split", x.value, sizes, outputs=len(out), axis=axis)


@emits("unbind")
def _unbind(t: Tracer, out: list[Spec], /, x: Traced, dim: int = 0) -> list[str]:
    return [_take(t, x.value, index, dim) for index in range(len(out))]


@emits("cat")
def _cat(t: Tracer, out: list[Spec], /, tensors: Sequence[Tensor], dim: int = 0) -> str:
    return t.node("Concat", *(t.read(x, out[0].dtype) for x in tensors), axis=dim)


@emits("pad")
def _pad(t: Tracer, out: list[Spec], /, x: Traced, pad: Sequence[int], **_: Any) -> str:
    """torch lists (before, after) from the last axis on; ONNX all befores, then all afters."""
    axes = [len(x.spec.shape) - 1 - i for i in range(len(pad) // 2)]
    zero = t.read(0.0, out[0].dtype)
    return t.node("Pad", x.value, t.integers([*pad[::2], *pad[1::2]]), zero, t.integers(axes))


@emits("__getitem__")
def _getitem(t: Tracer, out: list[Spec], /, x: Traced, index: Any) -> str:
    """Slices, integers, None, and one tensor of row numbers."""
    value, axis = x.value, 0
    for item in index if isinstance(index, tuple) else (index,):
        match item:
            case None:
                value = t.node("Unsqueeze", value, t.integers([axis]))
                axis += 1
            case int():
                value = _take(t, value, item, axis)
            case slice():
                if item != slice(None):
                    value = _slice(t, value, item, axis)
                axis += 1
            case Traced():
                value = t.node("Gather", value, item.value, axis=axis)
                axis += len(item.spec.shape)
            case _:
                raise NotImplementedError(f"indexing by {item!r}")
    return value


def _take(t: Tracer, value: str, index: int, axis: int) -> str:
    return t.node("Gather", value, t.constant(torch.tensor(index)), axis=axis)


def _slice(t: Tracer, value: str, bounds: slice, axis: int) -> str:
    start = 0 if bounds.start is None else bounds.start
    stop = torch.iinfo(torch.int64).max if bounds.stop is None else bounds.stop
    return t.node("Slice", value, *(t.integers([n]) for n in (start, stop, axis)))


# -- Layers ---------------------------------------------------------------------------------------


@emits("linear")
def _linear(
    t: Tracer, out: list[Spec], /, x: Traced, weight: Traced, bias: Traced | None = None
) -> str:
    """Gemm on rows: it reads the weight as it lies, [out, in], where MatMul would transpose it."""
    inner, outer = weight.spec.shape[1], weight.spec.shape[0]
    rows = t.node("Reshape", x.value, t.integers([-1, inner or 0]))
    biases = [] if bias is None else [bias.value]
    y = t.node("Gemm", rows, weight.value, *biases, transB=1)
    leading = t.shape_of(x, 0, len(x.spec.shape) - 1)
    return t.node("Reshape", y, t.node("Concat", leading, t.integers([outer or 0]), axis=0))


@emits("embedding")
def _embedding(
    t: Tracer, out: list[Spec], /, tokens: Traced, weight: Traced, *_: Any, **__: Any
) -> str:
    return t.node("Gather", weight.value, tokens.value, axis=0)


@emits("layer_norm")
def _layer_norm(
    t: Tracer,
    out: list[Spec],
    /,
    x: Traced,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> str:
    weight = torch.ones(*normalized_shape) if weight is None else weight
    biases = [] if bias is None else [t.read(bias, out[0].dtype)]
    scale = t.read(weight, out[0].dtype)
    return t.node("LayerNormalization", x.value, scale, *biases, axis=-1, epsilon=eps)


@emits("rms_norm")
def _rms_norm(
    t: Tracer,
    out: list[Spec],
    /,
    x: Traced,
    normalized_shape: Sequence[int],
    weight: Tensor,
    eps: float,
) -> str:
    scale = t.read(weight, out[0].dtype)
    return t.node("RMSNormalization", x.value, scale, axis=-1, epsilon=eps)


@emits("normalize")
def _normalize(
    t: Tracer,
    out: list[Spec],
    /,
    x: Traced,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    **_: Any,
) -> str:
    norm = t.node("ReduceL2", x.value, t.integers([dim]), keepdims=1)
    return t.node("Div", x.value, t.node("Max", norm, t.read(eps, out[0].dtype)))


@emits("mean")
def _mean(t: Tracer, out: list[Spec], /, x: Traced, dim: int) -> str:
    return t.node("ReduceMean", x.value, t.integers([dim]), keepdims=0)


@emits("scaled_dot_product_attention")
def _attention(
    t: Tracer,
    out: list[Spec],
    /,
    q: Traced,
    k: Traced,
    v: Traced,
    attn_mask: Traced | None = None,
    *,
    scale: float,
) -> str:
    """The node's metadata says where no GPU has a fused kernel, so that an engine must do without.

    That is in float32, for heads wider than 256 and for a single head of a single sample (the VAE
    is all three or two of these). Everywhere else an attention that falls apart into matrix
    products is a mistake, and an engine builder should refuse it.
    """
    masks = [] if attn_mask is None else [t.read(attn_mask, out[0].dtype)]
    value = t.node("Attention", q.value, k.value, v.value, *masks, scale=scale)
    batch, heads, _, head_dim = q.spec.shape
    if out[0].dtype == torch.float32 or (head_dim or 0) > FUSED_HEAD_DIM or batch == heads == 1:
        t.nodes[-1].metadata_props.add(key="decomposable", value="1")
    return value


@emits("rotary_embedding")
def _rotary_embedding(
    t: Tracer, out: list[Spec], /, x: Traced, cos: Traced, sin: Traced, num_heads: int
) -> str:
    return t.node(
        "RotaryEmbedding", x.value, cos.value, sin.value, interleaved=1, num_heads=num_heads
    )


@emits("root_of_channels")
def _root_of_channels(t: Tracer, out: list[Spec], /, x: Traced) -> str:
    return t.node("Sqrt", t.node("Cast", t.shape_of(x, 1, 2), to=ONNX_DTYPE[torch.float32]))


@emits("conv2d", "conv3d")
def _conv(
    t: Tracer,
    out: list[Spec],
    /,
    x: Traced,
    weight: Traced,
    bias: Traced | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str:
    axes = len(weight.spec.shape) - 2
    strides = [stride] * axes if isinstance(stride, int) else list(stride)
    pads = [padding] * axes if isinstance(padding, int) else list(padding)
    biases = [] if bias is None else [bias.value]
    return t.node("Conv", x.value, weight.value, *biases, strides=strides, pads=[*pads, *pads])


@emits("interpolate")
def _interpolate(
    t: Tracer, out: list[Spec], /, x: Traced, *, scale_factor: float, mode: str, **_: Any
) -> str:
    """Nearest neighbour at a whole factor, which all of ONNX's roundings agree on."""
    if mode != "nearest-exact" or scale_factor != int(scale_factor):
        raise NotImplementedError(f"interpolate by {scale_factor}, {mode}")
    scales = t.constant(torch.tensor([1.0, 1.0, scale_factor, scale_factor]))
    return t.node(
        "Resize",
        x.value,
        "",
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
