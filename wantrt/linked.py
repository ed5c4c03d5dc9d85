"""Guard of the linked folders `export/`, `kernels/`, `engines/` and `bench/`.

They are top-level folders reached through links inside `wantrt/`. From a checkout Python would also
find `kernels.rope`: a second copy of `wantrt.kernels.rope` with its own classes and caches, and
nothing would say so. So each of their modules calls `refuse_other_names(__spec__)`.
"""

from importlib.machinery import ModuleSpec


def refuse_other_names(spec: ModuleSpec | None) -> None:
    """Raise ImportError unless the calling module (its `__spec__`) is loaded as `wantrt.…`.

    `python -m wantrt.bench.x` passes; `python bench/x.py` (no spec) and `import bench.x` do not.
    """
    if spec is None:
        raise ImportError("run this file as a module: python -m wantrt.<folder>.<name>")
    if not spec.name.startswith("wantrt."):
        raise ImportError(f"import {spec.name} as wantrt.{spec.name}: it would be a second copy")
