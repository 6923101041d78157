"""What a rank says to the first one; above all, that it is there. Knows no model."""

import contextlib
import threading
import time
from typing import Any

from lmtool.engine.frames import Frames
from lmtool.engine.rank_wire import Present
from lmtool.engine.silence import PRESENT_S


class Voice:
    """It says from a thread of its own that the rank is there, and how far: loading and long steps do not keep it from
    it. number: of the last step that the rank is done with launching."""

    def __init__(self, frames: Frames) -> None:
        self.number = 0
        self._frames = frames
        self._lock = threading.Lock()
        threading.Thread(target=self._go_on, name="lmtool-present", daemon=True).start()

    def say(self, message: Any) -> None:
        """May be called from any thread. Raises OSError where nobody is there any more."""
        with self._lock:
            self._frames.send(message)

    def _go_on(self) -> None:
        with contextlib.suppress(OSError):  # whoever listens for what is to be done hears of it as well
            while True:
                self.say(Present(self.number))
                time.sleep(PRESENT_S)
