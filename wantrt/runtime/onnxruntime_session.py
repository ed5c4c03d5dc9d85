"""The `onnxruntime` runtime: a component's graph on the CPU, weights bound where they lie.

One InferenceSession serves all instances of a component; each instance is an IO binding that holds
the addresses of its weights. Weights are never copied: a memory-mapped file stays on disk until its
pages are read. Outputs are written into the caller's tensors, which is how caches ping-pong. There
are as many threads as torch has.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from wantrt.device import Device
from wantrt.errors import BundleError, ExecutionError, RuntimeUnavailableError
from wantrt.models.components import Component
from wantrt.runtime.binding import output_tensors, weights_of_instances
from wantrt.runtime.rewrite import rewrite_attention
from wantrt.session import Range, Tensors, TensorSpec

ELEMENT_TYPE = {torch.float32: onnx.TensorProto.FLOAT, torch.int64: onnx.TensorProto.INT64}


def load_sessions(
    component: Component,
    graph: Path | None,
    weights: Tensors,
    device: Device,
    num_threads: int | None = None,
) -> list["OnnxRuntimeSession"]:
    """One session for each instance of `component`. `num_threads` None: as many as torch has."""
    if graph is None:
        raise BundleError(f"{component.name}: runtime onnxruntime runs graphs, and none was given")
    if device.torch_device.type != "cpu":
        raise RuntimeUnavailableError("runtime onnxruntime runs on the CPU only")
    specs = (*component.inputs.values(), *component.outputs.values(), *component.weights.values())
    for spec in specs:
        if spec.dtype not in ELEMENT_TYPE:
            raise RuntimeUnavailableError(
                f"{component.name} is in {spec.dtype}, which ONNX Runtime does not run on a CPU. "
                "Build the bundle for it: wantrt build --runtime onnxruntime"
            )
    bound = weights_of_instances(component, weights)
    session = _load(component, graph, num_threads)
    return [OnnxRuntimeSession(component, session, instance) for instance in bound]


def _load(component: Component, graph: Path, num_threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = num_threads or torch.get_num_threads()
    # Each component has threads of its own. Spinning, as is the default, they would take the cores
    # for milliseconds after a run, from those of the component that runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    # In the order of the graph: the default order runs what needs no activations first, and holds
    # the rows of modulation of all tokens for all blocks from the beginning.
    options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
    try:
        model = onnx.load(graph)
        model = rewrite_attention(model)
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base of their own
        raise BundleError(
            f"{component.name}: ONNX Runtime cannot load {graph}: {error}. Run wantrt build again."
        ) from error


class OnnxRuntimeSession:
    """See `wantrt.session.Session`."""

    def __init__(
        self, component: Component, session: ort.InferenceSession, weights: Mapping[str, Tensor]
    ) -> None:
        self.component, self._session = component, session
        self._binding = session.io_binding()
        self._bound: dict[str, Tensor] = {}
        for name, weight in weights.items():
            self.bind(name, weight)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.component.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.component.outputs

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        return ()

    def prepare(self, symbols: Mapping[str, int]) -> None:
        pass

    def bind(self, name: str, tensor: Tensor) -> None:
        self._bound[name] = tensor  # keeps alive what the binding only points to
        self._bind_input(name, tensor)

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        results = {}
        for name, (shape, given) in output_tensors(
            self.component, {**self._bound, **inputs}, outputs
        ).items():
            dtype = self.component.outputs[name].dtype
            result = torch.empty(shape, dtype=dtype) if given is None else given
            address = result.data_ptr()
            self._binding.bind_output(name, "cpu", 0, ELEMENT_TYPE[dtype], shape, address)
            results[name] = result
        for name, tensor in inputs.items():
            self._bind_input(name, tensor)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise ExecutionError(f"{self.component.name} failed: {error}") from error
        return results

    def _bind_input(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            raise ExecutionError(f"{self.component.name}: input {name} must be contiguous")
        self._binding.bind_input(
            name, "cpu", 0, ELEMENT_TYPE[tensor.dtype], tuple(tensor.shape), tensor.data_ptr()
        )
