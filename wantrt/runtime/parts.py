"""The sessions of a part of a bundle: which file each component runs from, and its weights.

A plan is machine code: it is loaded if this machine compiled it, or if its user says that it is to
be trusted; otherwise it is compiled again from the bundle's graph, into the user's own cache.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from wantrt.bundle import Bundle
from wantrt.device import Device
from wantrt.errors import SettingsError
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component
from wantrt.runtime.fused import ops_for
from wantrt.runtime.loading import RUNTIMES, Files, Runtime
from wantrt.runtime.slots import Slots
from wantrt.runtime.streaming import stream_sessions
from wantrt.session import Session

log = logging.getLogger("wantrt")

STREAMED = ("text_stack", "dit_stack")


def load_part(
    bundle: Bundle,
    part: str,
    runtime: Runtime,
    device: Device,
    *,
    prefix: str = "",
    streamed: bool = False,
    slots: Slots | None = None,
    trust_plans: bool = False,
) -> dict[str, Sequence[Session]]:
    """Sessions of the components of `part` whose names begin with `prefix`, one an instance.

    Weights go to the device once; on a CPU they stay in their mapped files. A component that a
    runtime of plans has none for runs on torch, on the same device. streamed: the weights of the
    stacks wait in host memory (wantrt/runtime/streaming.py). slots: where the weights of all
    components shall lie; it must be free of baked plans (`is_bound`).
    """
    weights = _Weights(bundle, part, device)
    sessions: dict[str, Sequence[Session]] = {}
    on_torch = []
    ops = ops_for(device.torch_device)
    fused = {component.name: component for component in bundle.components(part, ops)}
    for component in bundle.components(part):
        if not component.name.startswith(prefix):
            continue
        plans = bundle.plans(component.name, part, runtime.name) if runtime.compiled else ()
        if runtime.compiled and not plans:
            on_torch.append(component.name)
        streams = streamed and component.name in STREAMED
        if streams and plans:
            plans = _bound_alone(component.name, plans)
        files = Files(
            bundle.graph(component.name, part),
            tuple(
                (plan, _trusted(bundle, component, part, plan, weights, trust_plans))
                for plan in plans
            ),
        )
        load = runtime.load
        if runtime.name == "torch" or component.name in on_torch:
            component, load = fused[component.name], RUNTIMES["torch"].load
        if streams:
            sessions[component.name] = stream_sessions(
                component, files, load, weights.on_host(component), device
            )
        elif slots is not None:
            sessions[component.name] = slots.load(
                component, files, load, weights.on_host(component)
            )
        else:
            bound = {} if _is_baked(plans) else weights.on_device(component)
            sessions[component.name] = load(component, files, bound, device)
    if on_torch:
        log.info(
            "%s of %s run on torch: %s has no plans for them",
            ", ".join(on_torch),
            part,
            runtime.name,
        )
    return sessions


def is_bound(bundle: Bundle, part: str, runtime: Runtime) -> bool:
    """Whether the weights of all components of a part lie apart from the plans that run."""
    return not any(
        _is_baked(bundle.plans(component.name, part, runtime.name))
        for component in bundle.manifest.components
        if part in component.parts
    )


def _is_baked(plans: Sequence[PlanRecord]) -> bool:
    return bool(plans) and all(plan.part is not None for plan in plans)


class _Weights:
    """Prepared tensors of a part, read when something needs them."""

    def __init__(self, bundle: Bundle, part: str, device: Device) -> None:
        self.bundle, self.part, self.device = bundle, part, device
        self._host: dict[str, Tensor] = {}
        self._moved: dict[str, Tensor] = {}

    def on_host(self, component: Component) -> dict[str, Tensor]:
        """Those of a component, mapped. Raises BundleError for a bundle without weights."""
        if not self._host:
            self._host = self.bundle.weights(self.part)
        names = {name for instance in component.instances for name in instance.values()}
        return {name: self._host[name] for name in sorted(names & self._host.keys())}

    def on_device(self, component: Component) -> dict[str, Tensor]:
        """The same on the device; components share what they have in common."""
        for name, tensor in self.on_host(component).items():
            if name not in self._moved:
                self._moved[name] = tensor.to(self.device.torch_device)
        return self._moved


def _bound_alone(component: str, plans: Sequence[PlanRecord]) -> tuple[PlanRecord, ...]:
    bound = tuple(plan for plan in plans if plan.part is None)
    if not bound:
        raise SettingsError(
            f"{component} was compiled with its weights inside (baked), which cannot be streamed. "
            "Compile it without: wantrt build --weights bound. Or take --residency phase."
        )
    return bound


def _trusted(
    bundle: Bundle,
    component: Component,
    part: str,
    plan: PlanRecord,
    weights: _Weights,
    trust_plans: bool,
) -> Path:
    """Where the plan lies that is run: in the bundle, or compiled again in the user's cache."""
    from wantrt.engines.cache import is_trusted, obtain
    from wantrt.engines.flavours import find_flavour
    from wantrt.engines.requests import PlanRequest

    path = bundle.path / plan.file
    if trust_plans or is_trusted(bundle.manifest.files[plan.file].sha256):
        return path
    _warn_once(bundle)
    baked: Mapping[str, Tensor] = {}
    if plan.part is not None:
        host = weights.on_host(component)
        instance = component.instances[plan.instance or 0]
        baked = {name: host[prepared] for name, prepared in instance.items()}
    flavour = find_flavour(plan.runtime)
    request = PlanRequest(
        component=component,
        graph=bundle.graph(component.name, part),
        symbols=plan.symbols,
        targets=plan.targets if flavour.served_targets else flavour.choose_targets(),
        baked=baked,
        tf32=plan.tf32,
        plugins=plan.plugins,
    )
    return obtain(flavour, request).path


_warned: set[str] = set()


def _warn_once(bundle: Bundle) -> None:
    if bundle.fingerprint not in _warned:
        _warned.add(bundle.fingerprint)
        log.warning(
            "%s has plans that were not compiled on this machine. A plan is machine code, so they "
            "are compiled again from its graphs, once. To run them as they are: --trust-plans",
            bundle.path,
        )
