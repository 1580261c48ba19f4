"""Limits on everything that comes from outside, with units. One place, frozen."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper bounds that hold on every route. All sizes in bytes."""

    head: int = 1 * MIB  #: head.json, decoded
    main: int = 16 * MIB  #: repomd.xml, Release, InRelease, a signature
    content: int = 4 * GIB  #: one opened content
    published: int = 4 * GIB  #: one published file
    files: int = 4096  #: files in one snapshot
    snapshots: int = 4096  #: snapshots in one head
    path: int = 512  #: characters of a path inside a repository
    pack: int = 16 * GIB  #: one pack
    toc: int = 512 * MIB  #: a pack's table of contents, decoded
    index: int = 64 * MIB  #: one index, decoded
    chunks: int = 16_777_216  #: chunks in one index
    chunk: int = 4 * MIB  #: one chunk
    dictionary: int = 1 * MIB  #: a frame dictionary
    delta_ops: int = 8_388_608  #: operations in one delta
    delta_prefix: int = 32 * MIB  #: zstd prefix of one delta
    delta_window_log: int = 27  #: zstd window of one delta, log2
    delta_bases: int = 16  #: bases of one delta
    reconcile_content: int = 256 * MIB  #: a content that a server makes reconcile deltas of
    reconcile_request: int = 1 * MIB  #: body of a reconcile request
    reconcile_answer: int = 32 * MIB  #: answers of the reconcile routes
    reconcile_tracks: int = 64  #: tracks in one reconcile request
    reconcile_at_once: int = 2  #: reconcile requests of one client at a time
    reconcile_seconds: int = 60  #: processor time of one reconcile answer, in seconds
    recipe_header: int = 4 * KIB  #: header bytes a recipe keeps
    side_contents: int = 4  #: side contents of one recipe


LIMITS = Limits()
