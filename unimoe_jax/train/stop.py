"""Stop after the current step when a signal comes, on all processes after the same step."""

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
    """Records SIGTERM and SIGINT; all processes see a signal at the same call of `agreed`.

    To agree, the processes compute a maximum over all devices: 1 where a signal has come, else 0.
    It is started at one call of `agreed` and read at the next, so no process waits for it, and a
    signal takes effect one step later. For example, with two processes and a signal to process 1
    during step 7, the vote of step 7 is max(0, 1) = 1, and both processes stop after step 8.
    """

    def __init__(self, mesh: Mesh):
        self.received: str | None = None
        self._shardings = one_per_device(mesh), replicated(mesh)
        self._largest = jax.jit(jnp.max, out_shardings=self._shardings[1])
        self._vote: jax.Array | None = None
        self._agreed = False

    def install(self) -> None:
        """Handle signals from here on.

        Python allows that in the main thread only. In another thread nothing is installed, and the
        caller has to stop the loop.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        del frame
        if self.received:  # A second signal ends the program at once.
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if jax.process_index() == 0:
            # os.write instead of print, because the signal may interrupt another print.
            message = f"\n{self.received}: stopping after this step; once more: at once, unsaved\n"
            os.write(2, message.encode())

    def agreed(self) -> bool:
        """Whether to stop now; the same on all processes, which must call this equally often."""
        if jax.process_count() == 1:
            return self.received is not None
        if not self._agreed:
            vote = self._cast()
            self._agreed = self._vote is not None and int(self._vote) > 0
            self._vote = vote
        return self._agreed

    def _cast(self) -> jax.Array:
        count = (jax.device_count(),)
        vote = np.full(1, self.received is not None, np.int32)
        votes = jax.make_array_from_callback(count, self._shardings[0], lambda _: vote)
        return self._largest(votes)

    @property
    def reason(self) -> str:
        """What stopped the run, for messages."""
        return self.received or "a signal to another process"
