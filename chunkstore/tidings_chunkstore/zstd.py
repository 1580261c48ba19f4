"""The one place that knows where Python's zstd module lives.

It is ``compression.zstd`` in the standard library from Python 3.14 on (PEP 784), and the
``backports.zstd`` distribution, with the same interface, before. Use ``from .zstd import zstd``.
"""

from __future__ import annotations

import sys

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = ["zstd"]
