"""Tidings client: fetch, rebuild, verify, switch.

The library's door is ``sync.sync(options, remote)``; the command's is ``cli.main``. Nothing is
imported here: a sync that finds no news is mostly Python's own start.
"""


def version() -> str:
    """The installed release; ``0`` in a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("tidings")
    except metadata.PackageNotFoundError:
        return "0"
