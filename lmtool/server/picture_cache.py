"""`PictureCache`: pictures that were prepared, by their files' hashes. A conversation sends all of its pictures again
with each turn; the engine has their rows in its cache, and they need not be decoded for that."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

from lmtool.images.prepared import PreparedImage

MAX_BYTES = 64 << 20  # some forty of the largest that LLaVA takes


class PictureCache:
    """Those not used for longest go first. Safe on any thread."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._found: OrderedDict[bytes, PreparedImage] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, data: bytes, prepare: Callable[[bytes], PreparedImage]) -> PreparedImage:
        """Of a file's bytes; prepared if it is not there."""
        key = blake2b(data, digest_size=32).digest()
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        image = prepare(data)
        with self._lock:
            if key not in self._found:  # else another thread was as fast
                self._found[key] = image
                self._num_bytes += len(image.pixels)
            while self._num_bytes > self._max_bytes:
                self._num_bytes -= len(self._found.popitem(last=False)[1].pixels)
        return image
