"""Workers end with the process that started them, however that one ended.

A supervisor that is killed stops nobody: its workers would go on serving, hold the port against
the next start, and keep the old settings.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def end_with_parent() -> None:
    """In a worker: stop as on SIGTERM when the supervisor is gone. Elsewhere: nothing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()
