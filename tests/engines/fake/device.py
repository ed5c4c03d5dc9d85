"""A GPU that is none: `wantrt.device.Device` on CPU memory, which tells when a rule is broken.

Work runs at once, but the device keeps account of what a real one would still be doing: a clock for
each stream and for the host, and for every tensor who wrote and read it when. What reads or
overwrites a tensor must come after (in its stream, by an event, by a synchronisation) whoever wrote
or read it before. Captured work is recorded operation by operation, on addresses, and not run; a
replay runs the operations again, not the Python that led to them.

    with FakeDevice() as device: ...

Inside, tensors on `device.torch_device` ("cpu:0") are device memory, and those on "cpu" are not.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from wantrt.device import ALIGNMENT_BYTES, Arena

HOST = "the host"
SCRATCH = "scratch memory"
HERE = torch.device("cpu")  # where the host's memory is
THERE = torch.device("cpu", 0)  # where the device's is: another device to torch, the same memory

Clock = dict[str, int]  # of each stream and of the host: how much of their work is known to be done


class RuleBroken(AssertionError):
    """What would be undefined behaviour, or an error of CUDA's, on a real device."""


@dataclass(eq=False)
class Allocation:
    """Device or pinned memory of one storage, and who used it last."""

    storage: StorageWeakRef
    address: int
    nbytes: int
    pinned: bool
    written: tuple[str, int] | None = None
    read: Clock = field(default_factory=dict)
    version: int = 0  # counts the writes

    @property
    def freed(self) -> bool:
        return bool(self.storage.expired())


class FakeDevice:
    """See the module. One at a time may be entered."""

    torch_device = THERE
    name = "Fake RTX, CUDA driver 13.0"
    architecture = "sm89"
    total_bytes = 2**34
    _handles = count(0x5EED0)
    by_stream: ClassVar[dict[int, "FakeDevice"]] = {}

    def __init__(self) -> None:
        self.stream_handle = next(self._handles)
        self.scratch = Arena(self._allocate_scratch)
        self.broken: list[str] = []  # rules, even where the product caught the exception
        self.launches = 0  # of plans, replays included
        self.replays = 0
        self._allocations: dict[int, Allocation] = {}
        self._clocks: dict[str, Clock] = {}
        self._stream = "the default stream"
        self._recording: Recording | None = None
        self._modes = ExitStack()

    def __enter__(self) -> Self:
        FakeDevice.by_stream[self.stream_handle] = self
        self._modes.enter_context(_Functions(self))
        self._modes.enter_context(_Operators(self))
        return self

    def __exit__(self, *_: object) -> None:
        del FakeDevice.by_stream[self.stream_handle]
        self._modes.close()

    # -- The Device protocol ----------------------------------------------------------------------

    @property
    def capturing(self) -> bool:
        return self._recording is not None

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=THERE)

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self._register(tensor, pinned=True)
        return tensor

    @contextmanager
    def stream(self) -> Iterator[None]:
        yield from self._on("the stream")

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        if self.capturing:
            self.breaks("a captured graph holds the work of one stream; the side stream is another")
        yield from self._on("the side stream")

    def event(self) -> "FakeEvent":
        return FakeEvent(self)

    def synchronize(self) -> None:
        self._forbid_in_capture("synchronize")
        self._learn(HOST, self._clock("the stream"))

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        if self.capturing:
            self.breaks("a capture inside a capture")
        self.synchronize()
        recording = self._recording = Recording(self)
        try:
            with self.stream():
                work()
        finally:
            self._recording = None
        self.scratch.freeze()
        return recording.replay

    def release(self) -> None:
        self.synchronize()
        self.scratch = Arena(self._allocate_scratch)

    def free_bytes(self) -> int:
        return self.total_bytes - sum(a.nbytes for a in self._live() if not a.pinned)

    def _allocate_scratch(self, nbytes: int) -> Tensor:
        return self.empty((nbytes,), torch.uint8)

    # -- What the fake TensorRT and the tests ask -------------------------------------------------

    def launch(
        self,
        what: str,
        reads: Mapping[str, tuple[int, int]],
        writes: Mapping[str, tuple[int, int]],
        compute: Callable[[Mapping[str, Allocation]], None],
    ) -> None:
        """Run `compute` on the stream. reads, writes: name -> address and bytes.

        `compute` gets the memory that each name lies in.
        """
        used = [
            (name, self._find(what, name, *region), kind == "writes")
            for kind, regions in (("reads", reads), ("writes", writes))
            for name, region in regions.items()
        ]

        def run() -> None:
            self.launches += 1
            for name, allocation, written in used:
                if allocation.freed:
                    self.breaks(f"{what}: the memory of {name} was freed after the capture")
                self.access(allocation, f"{what}: {name}", written)
            with unheard():
                compute({name: allocation for name, allocation, _ in used})

        if self._recording is not None:
            self._recording.steps.append(run)
            return
        with self._as_stream("the stream"):
            self._tick(self._stream)
            run()

    @property
    def ticks(self) -> int:
        """How much was launched on the stream."""
        return self._clock("the stream").get("the stream", 0)

    @property
    def ticks_done(self) -> int:
        """How much of it the host knows to be done."""
        return self._clock(HOST).get("the stream", 0)

    def breaks(self, rule: str) -> NoReturn:
        self.broken.append(rule)
        raise RuleBroken(rule)

    def is_device(self, tensor: Tensor) -> bool:
        allocation = self.allocation(tensor)
        return allocation is not None and not allocation.pinned

    def allocation(self, tensor: Tensor) -> Allocation | None:
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return None  # one that stands for something else, while a graph is exported
        allocation = self._allocations.get(tensor.untyped_storage()._cdata)
        return None if allocation is None or allocation.freed else allocation

    def access(self, allocation: Allocation, what: str, write: bool) -> None:
        """The current stream uses memory: after whoever wrote it, and to write, read it."""
        actor = self._stream
        known = self._clock(actor)
        before = [allocation.written] if allocation.written else []
        before += list(allocation.read.items()) if write else []
        for other, tick in before:
            if other != actor and known.get(other, 0) < tick:
                self.breaks(f"{what}: {actor} uses it while {other} may still be at it")
        if write:
            allocation.written, allocation.read = (actor, known.get(actor, 0)), {}
            allocation.version += 1
        else:
            allocation.read[actor] = known.get(actor, 0)

    # -- Clocks and memory ------------------------------------------------------------------------

    def _on(self, stream: str) -> Iterator[None]:
        with self._as_stream(stream):
            yield

    @contextmanager
    def _as_stream(self, stream: str) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before

    def _clock(self, actor: str) -> Clock:
        return self._clocks.setdefault(actor, {})

    def _tick(self, actor: str) -> None:
        """`actor` begins something new. What is launched comes after what the host did before."""
        if actor != HOST:
            self._learn(actor, self._clock(HOST))
        clock = self._clock(actor)
        clock[actor] = clock.get(actor, 0) + 1

    def _learn(self, actor: str, other: Clock) -> None:
        clock = self._clock(actor)
        for name, tick in other.items():
            clock[name] = max(clock.get(name, 0), tick)

    def _live(self) -> list[Allocation]:
        self._allocations = {k: a for k, a in self._allocations.items() if not a.freed}
        return list(self._allocations.values())

    def _register(self, tensor: Tensor, pinned: bool = False) -> Allocation:
        storage = tensor.untyped_storage()
        allocation = Allocation(
            StorageWeakRef(storage), storage.data_ptr(), storage.nbytes(), pinned
        )
        self._allocations[storage._cdata] = allocation
        return allocation

    def _find(self, what: str, name: str, address: int, nbytes: int) -> Allocation:
        for allocation in self._live():
            if allocation.address <= address < allocation.address + max(allocation.nbytes, 1):
                if allocation.pinned:
                    self.breaks(f"{what}: {name} lies in host memory")
                if address + nbytes > allocation.address + allocation.nbytes:
                    self.breaks(f"{what}: {name} needs {nbytes} bytes, its memory is smaller")
                if name != SCRATCH and (address - allocation.address) % ALIGNMENT_BYTES:
                    self.breaks(f"{what}: {name} is not aligned to {ALIGNMENT_BYTES} bytes")
                return allocation
        self.breaks(f"{what}: the address of {name} is in no live memory of the device")

    def _forbid_in_capture(self, what: str) -> None:
        if self.capturing:
            self.breaks(f"{what} while capturing: the host cannot wait for work that is not run")

    # -- Tensors between host and device ----------------------------------------------------------

    def upload(self, tensor: Tensor) -> Tensor:
        """A copy in device memory; the host waits."""
        self._forbid_in_capture("a copy to the device")
        source = self.allocation(tensor)
        self._tick(self._stream)
        if source is not None:
            self.access(source, "the source of a copy", write=False)
        made = _clone(tensor)
        self.access(self._register(made), "a new tensor", write=True)
        self._learn(HOST, self._clock(self._stream))
        return made

    def download(self, tensor: Tensor) -> Tensor:
        """A copy in host memory; the host waits for the current stream."""
        self._read_by_host(tensor, "a copy to the host")
        return _clone(tensor)

    def _read_by_host(self, tensor: Tensor, what: str) -> None:
        self._forbid_in_capture(what)
        allocation = self.allocation(tensor)
        assert allocation is not None
        self._tick(self._stream)
        self.access(allocation, what, write=False)
        self._learn(HOST, self._clock(self._stream))

    def operate(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One operator of torch's: on the device if any tensor is there, or is to be made there."""
        tensors = _tensors((args, kwargs))
        packet = func.overloadpacket.__name__
        there = [t for t in tensors if self.is_device(t)]
        if packet == "copy_" and len(there) == 1:
            return self._copy(func, args, kwargs)
        if not there and kwargs.get("device") != THERE:
            return self._operate_on_host(func, args, kwargs, tensors)
        for tensor in tensors:
            if tensor.dim() > 0 and not self.is_device(tensor):
                self.breaks(f"{func}: operands on the device and on the host")
        if packet in ("item", "is_nonzero", "equal", "_local_scalar_dense"):
            for tensor in there:
                self._read_by_host(tensor, f"{packet} of a device tensor")
            return func(*args, **kwargs)
        if self._recording is not None:
            return self._recording.record(func, args, kwargs)
        self._tick(self._stream)
        self._check_accesses(func, args, kwargs)
        result = func(*args, **kwargs)
        self._own(result, written=not packet.startswith(("empty", "new_empty")))
        return result

    def _operate_on_host(
        self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        pinned = any(self.allocation(tensor) for tensor in tensors)
        with self._as_stream(HOST):
            self._tick(HOST)
            if pinned:
                self._check_accesses(func, args, kwargs)
            return func(*args, **kwargs)

    def _copy(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Between host and device, in place. Only what is pinned can be copied without waiting."""
        into, source = args[0], args[1]
        waits = not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking")
        outside = source if self.is_device(into) else into
        pinned = self.allocation(outside) is not None
        if self._recording is not None and (pinned or outside.dim() == 0):
            return self._recording.record(func, args, kwargs)
        if waits or not pinned:
            self._forbid_in_capture("a copy between host and device")
        self._tick(self._stream)
        self._check_accesses(func, args, kwargs)
        result = func(*args, **kwargs)
        if waits or not pinned:
            self._learn(HOST, self._clock(self._stream))
        return result

    def _check_accesses(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        written = _written(func, args, kwargs)
        for tensor in _tensors((args, kwargs)):
            allocation = self.allocation(tensor)
            if allocation is not None:
                self.access(allocation, str(func), any(tensor is w for w in written))

    def _own(self, result: Any, written: bool = True) -> None:
        """New memory among the results of an operator is the device's."""
        for tensor in _tensors(result):
            if self.allocation(tensor) is None:
                allocation = self._register(tensor)
                if written:
                    self.access(allocation, "a new tensor", write=True)


class FakeEvent:
    """Knows what the stream knew when it was recorded."""

    def __init__(self, device: FakeDevice) -> None:
        self._device, self._clock = device, Clock()

    def record(self) -> None:
        self._device._forbid_in_capture("an event")
        self._device._tick(self._device._stream)
        self._clock = dict(self._device._clock(self._device._stream))

    def wait(self) -> None:
        self._device._forbid_in_capture("an event")
        self._device._learn(self._device._stream, self._clock)


class Recording:
    """A captured graph: operations on addresses. Memory that it made itself stays its own."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.steps: list[Callable[[], None]] = []
        self._pool: dict[int, Tensor] = {}  # by storage

    def record(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Take note of an operator without running it; what it would make holds nothing yet."""
        frozen = tree_map_only(Tensor, self._freeze, (tuple(args), kwargs))
        if func._schema.is_mutable:
            self.steps.append(partial(self._run, func, frozen, ()))
            written = _written(func, args, kwargs)
            return written[0] if len(written) == 1 else tuple(written)
        result = func(*args, **kwargs)
        self.device._own(result)
        given = _storages((args, kwargs))
        made = [tensor for tensor in _tensors(result) if not _storages(tensor) & given]
        for tensor in made:
            self._pool[tensor.untyped_storage()._cdata] = tensor
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
        if made:
            self.steps.append(partial(self._run, func, frozen, made))
        return result

    def replay(self) -> None:
        self.device._forbid_in_capture("a replay")
        self.device.replays += 1
        self.device._tick(self.device._stream)
        for step in self.steps:
            step()

    def _run(self, func: Any, frozen: Any, made: Sequence[Tensor]) -> None:
        args, kwargs = tree_map_only(_Frozen, self._thaw, frozen)
        self.device._check_accesses(func, args, kwargs)
        results = func(*args, **kwargs)
        if made:
            given = _storages((args, kwargs))
            fresh = [t for t in _tensors(results) if not _storages(t) & given]
            for tensor, value in zip(made, fresh, strict=True):
                self.device.access(self.device.allocation(tensor), str(func), write=True)
                tensor.copy_(value)

    def _freeze(self, tensor: Tensor) -> "_Frozen":
        if self.device.allocation(tensor) is None:
            return _Frozen(tensor.clone(), None)  # a number of the host's, as it was
        if tensor.untyped_storage()._cdata in self._pool:
            return _Frozen(tensor, None)
        layout = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
        return _Frozen(None, (StorageWeakRef(tensor.untyped_storage()), *layout))

    def _thaw(self, frozen: "_Frozen") -> Tensor:
        if frozen.tensor is not None:
            return frozen.tensor
        reference, dtype, *layout = frozen.outside
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is None:
            self.device.breaks("a replay uses a tensor that was freed after the capture")
        return torch.empty(0, dtype=dtype).set_(storage, *layout)


@dataclass(eq=False)
class _Frozen:
    """A tensor as a graph knows it: its own, or an address in memory that others may free."""

    tensor: Tensor | None
    outside: Any


def _clone(tensor: Tensor) -> Tensor:
    """A copy that the device does not hear of."""
    with unheard():
        return tensor.clone()


@contextmanager
def unheard() -> Iterator[None]:
    """What the fakes do themselves with tensors, and much faster."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        return []
    return [tensor for value in values for tensor in _tensors(value)]


def _storages(values: Any) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in _tensors(values)}


def _written(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes to."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += [value] if isinstance(value, Tensor) else list(value or ())
    return written


class _Operators(TorchDispatchMode):
    """Every operator passes the device."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.device.operate(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What torch would not ask its operators about: both devices are CPUs to it."""

    def __init__(self, device: FakeDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            told = func(*args)
            return (
                told if told.type == "meta" else THERE if self.device.is_device(args[0]) else HERE
            )
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == THERE:
            made = func(*args, **{**kwargs, "device": HERE})
            return self.device.upload(made)
        if func is Tensor.cpu:
            return self._move(args[0], HERE)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and self.device.is_device(args[0]):
            raise TypeError("can't convert a device tensor to numpy. Use Tensor.cpu() first.")
        if func is Tensor.tolist and self.device.is_device(args[0]):
            return self.device.download(args[0]).tolist()
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        where, rest = None, []
        for argument in args:
            if isinstance(argument, Tensor):
                where = THERE if self.device.is_device(argument) else HERE
                rest.append(argument.dtype)
            elif isinstance(argument, (torch.device, str)):
                where = torch.device(argument)
            else:
                rest.append(argument)
        if kwargs.get("device") is not None:
            where = torch.device(kwargs["device"])
        others = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        if rest and isinstance(rest[0], bool):  # non_blocking, copy
            rest = []
        if rest or others:
            tensor = Tensor.to(tensor, *rest, **others)
        return tensor if where is None else self._move(tensor, where)

    def _move(self, tensor: Tensor, where: torch.device) -> Tensor:
        if self.device.is_device(tensor) == (where == THERE):
            return tensor
        if where == THERE:
            return self.device.upload(tensor)
        return self.device.download(tensor)
