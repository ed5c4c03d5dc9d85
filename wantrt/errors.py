"""Named exceptions. Every message says what was wrong, what was expected and what to do.

All derive from `WantrtError`, so an application catches one class; those that are also plain value
or file errors derive from the built-in too, so ordinary ``except ValueError`` works.
"""


class WantrtError(Exception):
    """Base of everything wantrt raises on purpose; the command line shows it without traceback."""


class SettingsError(WantrtError, ValueError):
    """A setting that the model or the task cannot serve (size, frames, solver, variant ...)."""


class UnsupportedTaskError(WantrtError):
    """A task, runtime or precision that this version does not have yet."""


class CheckpointError(WantrtError):
    """A checkpoint that is missing, damaged, of another layout, or whose tensors do not fit."""


class BundleError(WantrtError):
    """A bundle that is missing, damaged, altered, foreign or of a newer schema."""


class BuildError(WantrtError):
    """A build that cannot start or go on (no space, locked by another build ...)."""


class RuntimeUnavailableError(WantrtError):
    """A runtime whose library or device is not there; the message says what to install."""


class ExecutionError(WantrtError):
    """A component that failed while running."""


class MediaError(WantrtError):
    """An image or video that cannot be read or written."""


class CancelledError(WantrtError):
    """Work stopped on request: a generation by its step callback, a plan by its builder's."""


class BenchError(WantrtError, ValueError):
    """A measurement that cannot be compared or read: another schema, unequal settings, damage."""
