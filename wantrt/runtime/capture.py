"""Work that repeats on the same buffers: run once as it is, then captured, then replayed.

What is captured is a matter of the device (`Device.capture`): a CUDA graph on a GPU, the work
itself on a CPU, so there is one code for both.
"""

import logging
from collections.abc import Callable

from wantrt.device import Device

log = logging.getLogger("wantrt")


class Repeated:
    """Call it as often as the work is to be done. The work returns nothing and allocates nothing
    that outlives it: it reads and writes tensors whose addresses stay.

    The first call is an ordinary run: libraries load and tune their kernels at it. The second one
    captures and replays. If the device refuses, that is said once and the work runs ordinarily.
    """

    def __init__(self, what: str, work: Callable[[], None], device: Device) -> None:
        self.what, self.device = what, device
        self._work = work
        self._ran = False
        self._replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self._ran and self._replay is None:
            self._replay = self._capture()
        (self._replay or self._work)()
        self._ran = True

    def _capture(self) -> Callable[[], None]:
        try:
            return self.device.capture(self._work)
        except Exception as error:  # CUDA and sessions each have their own
            log.warning(
                "%s could not be captured and runs without a graph, which gives the same and may "
                "be slower: %s",
                self.what,
                str(error),  # the error itself holds, by its traceback, what the work held
            )
            return self._work
