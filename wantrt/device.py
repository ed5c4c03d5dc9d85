"""Where sessions run: memory, order, and captured work. All that knows CUDA is here.

The same code runs on a CPU and on a GPU. Work is ordered by one stream; copies that should not wait
for it go to a second one and meet it at events.
"""

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol
from weakref import ref

import torch
from torch import Tensor

from wantrt.errors import RuntimeUnavailableError

ALIGNMENT_BYTES = 256  # of scratch memory and of tensors, as TensorRT wants it


class Event(Protocol):
    """A point in a stream. `record` and `wait` speak of the stream that is current."""

    def record(self) -> None: ...

    def wait(self) -> None: ...


class Device(Protocol):
    """See `CUDADevice` and `CPUDevice`."""

    @property
    def torch_device(self) -> torch.device: ...

    @property
    def name(self) -> str:
        """Model and driver: what TensorRT-RTX compiles kernels for when a plan is loaded."""
        ...

    @property
    def architecture(self) -> str:
        """As `--target` names it: "sm90"; "cpu" on a CPU."""
        ...

    @property
    def capturing(self) -> bool:
        """Whether work is being recorded, not run."""
        ...

    @property
    def scratch(self) -> "Arena":
        """What sessions compute in. They never run at once, so they share it."""
        ...

    @property
    def stream_handle(self) -> int:
        """The address of the CUDA stream; 0 on a CPU."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Host memory that `side_stream` copies from while the stream computes."""
        ...

    def stream(self) -> AbstractContextManager[object]:
        """The stream on which all sessions of a pipeline run, as a context."""
        ...

    def side_stream(self) -> AbstractContextManager[object]:
        """Another stream, for copies; ordered with the first by events alone."""
        ...

    def event(self) -> Event: ...

    def synchronize(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which has run once already, and return what replays it.

        Raises what CUDA or the session says if it cannot be recorded; then nothing was.
        """
        ...

    def release(self) -> None:
        """Give back the scratch block and what torch keeps for itself, when sessions are gone.

        Nothing that was captured may run afterwards.
        """
        ...

    def free_bytes(self) -> int:
        """Memory that is free for weights, caches and scratch."""
        ...


class Arena:
    """One block of scratch memory for everything that never runs at once: the largest need.

    Needs are told first (`reserve`), and the block is made at its first use. A captured graph holds
    its address: after `freeze`, a larger need gets a new block and the old one stays.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._block: Tensor | None = None
        self._held: list[Tensor] = []  # by captured graphs
        self._frozen = False
        self.nbytes = 0

    def reserve(self, nbytes: int) -> None:
        self.nbytes = max(self.nbytes, nbytes)

    def block(self) -> tuple[int, int]:
        """Address, aligned to 256 bytes, and size."""
        if self._block is None or len(self._block) < self.nbytes + ALIGNMENT_BYTES:
            if self._block is not None and self._frozen:
                self._held.append(self._block)
            self._block = None  # the old one is freed before the new one is made
            self._block = self._allocate(self.nbytes + ALIGNMENT_BYTES)
            self._frozen = False
        address = self._block.data_ptr()
        return address + -address % ALIGNMENT_BYTES, self.nbytes

    def freeze(self) -> None:
        """Something that was captured uses the block as it is now."""
        self._frozen = True


class CPUDevice:
    """Runs in order by itself: nothing to wait for, nothing to capture."""

    torch_device = torch.device("cpu")
    name = architecture = "cpu"
    stream_handle = 0
    capturing = False

    def __init__(self) -> None:
        self.scratch = Arena(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def side_stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def event(self) -> Event:
        return _NoEvent()

    def synchronize(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def release(self) -> None:
        self.scratch = Arena(lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))

    def free_bytes(self) -> int:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024


class _NoEvent:
    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass


class CUDADevice:
    """One GPU, one stream for work and one for copies; captured work is a CUDA graph."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                "no CUDA device: torch finds no GPU (or is a CPU build). "
                "Use a CPU runtime: --runtime onnxruntime"
            )
        self.torch_device = torch.device("cuda", index)
        self.name = f"{torch.cuda.get_device_name(self.torch_device)}, {_cuda_driver()}"
        self.architecture = "sm{}{}".format(*torch.cuda.get_device_capability(self.torch_device))
        self.capturing = False
        self._stream = torch.cuda.Stream(self.torch_device)
        self._copies = torch.cuda.Stream(self.torch_device)
        self.stream_handle = self._stream.cuda_stream
        self.scratch = Arena(self._allocate_scratch)
        self._last_graph: Callable[[], torch.cuda.CUDAGraph | None] = lambda: None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def side_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._copies)

    def event(self) -> Event:
        return torch.cuda.Event()

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph, last = torch.cuda.CUDAGraph(), self._last_graph()
        self._stream.synchronize()
        self.capturing = True
        try:
            with torch.cuda.graph(
                graph,
                # replays come one after another and leave nothing behind: one memory for all
                pool=None if last is None else last.pool(),
                stream=self._stream,
                # other threads may do what they like meanwhile: they write the last video's file
                capture_error_mode="thread_local",
            ):
                work()
        finally:
            self.capturing = False
        self.scratch.freeze()
        self._last_graph = ref(graph)
        return graph.replay

    def release(self) -> None:
        self._stream.synchronize()
        self.scratch = Arena(self._allocate_scratch)
        torch.cuda.empty_cache()  # TensorRT allocates by itself

    def free_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.torch_device)
        cached = torch.cuda.memory_reserved(self.torch_device)
        return free + cached - torch.cuda.memory_allocated(self.torch_device)

    def _allocate_scratch(self, nbytes: int) -> Tensor:
        with self.stream():  # freed, its memory goes to later work of the same stream
            return self.empty((nbytes,), torch.uint8)


def _cuda_driver() -> str:
    version = ctypes.c_int()
    ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA driver {version.value // 1000}.{version.value % 1000 // 10}"  # 13000 is 13.0
