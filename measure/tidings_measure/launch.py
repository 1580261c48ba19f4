"""Runs one program and tells what it took: ``launch.py FD PROGRAM ARGUMENT...``, as a process.

Small on purpose: Linux counts the memory of the process that starts a program as the program's
own, so the starter must need less than anything it measures (about 9 MB).
"""

import os
import sys
import time


def main() -> int:
    """Start the program, wait for it, write one line of facts to the descriptor."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    started = time.monotonic()
    try:
        child = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ)
    except OSError as error:
        print(f"{sys.argv[2]}: {error.strerror}", file=sys.stderr)
        return 127
    _, status, usage = os.wait4(child, 0)
    wall = time.monotonic() - started
    # ru_maxrss is in KiB on Linux (getrusage(2)).
    line = f"{usage.ru_utime + usage.ru_stime:.6f} {wall:.6f} {usage.ru_maxrss * 1024}\n"
    os.write(descriptor, line.encode())
    return os.waitstatus_to_exitcode(status) & 0xFF


if __name__ == "__main__":
    sys.exit(main())
