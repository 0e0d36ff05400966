"""Compilers: finding and running them, and explaining their output. Knows nothing of the cache."""

import os
import threading

# A fork would keep the import locks of another thread for ever: it waits for the imports.
importing = threading.RLock()
os.register_at_fork(
    before=importing.acquire, after_in_parent=importing.release, after_in_child=importing.release
)
