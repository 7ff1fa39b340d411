"""Leaving after the current step when SIGTERM or SIGINT comes, on all processes after the same."""

from __future__ import annotations

import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unimoe_jax.parallel.sharding import one_per_device, replicated


class StopSignal:
    """Notes SIGTERM and SIGINT; all processes learn of it at the same call of `agreed`.

    The agreement is a maximum over all devices that is started at one call and read at the next, so
    that nobody waits for it: a signal takes effect one step later.
    """

    def __init__(self, mesh: Mesh):
        self.received: str | None = None
        self._shardings = one_per_device(mesh), replicated(mesh)
        self._largest = jax.jit(jnp.max, out_shardings=self._shardings[1])
        self._vote: jax.Array | None = None
        self._agreed = False

    def install(self) -> None:
        """Only the main thread may handle signals; elsewhere the caller stops the loop."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        del frame
        if self.received:  # a second signal does not wait
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if jax.process_index() == 0:  # not print: the signal may come in the middle of one
            told = f"\n{self.received}: stopping after this step; once more: at once, unsaved\n"
            os.write(2, told.encode())

    def agreed(self) -> bool:
        """Whether to stop now; the same on all processes, which must call it equally often."""
        if jax.process_count() == 1:
            return self.received is not None
        if not self._agreed:
            vote = self._cast()
            self._agreed = self._vote is not None and int(self._vote) > 0
            self._vote = vote
        return self._agreed

    def _cast(self) -> jax.Array:
        count = (jax.device_count(),)
        own = np.full(1, self.received is not None, np.int32)
        return self._largest(jax.make_array_from_callback(count, self._shardings[0], lambda _: own))

    @property
    def reason(self) -> str:
        """For messages."""
        return self.received or "a signal to another process"
