"""What the dnf 4 plugin and the dnf 5 helper share. Standard library only, Python 3.6 syntax.

Nothing here decides what metadata is right. It finds mirrors, runs ``tidings stage`` into a scratch
folder, and moves a folder into dnf's cache after dnf itself has confirmed it.
"""

import configparser
import contextlib
import ctypes
import fnmatch
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
import urllib.parse
import xml.etree.ElementTree

CONFIG = "/etc/dnf/plugins/tidings.conf"
SCRATCH = "tidings"  # folder in dnf's cache folder; nothing in it is read by dnf
STAGED = "staged"  # folder in that one, where `tidings stage` writes; dnf is never pointed there
REPODATA = "repodata"
REPOMD = os.path.join(REPODATA, "repomd.xml")

WEEK = 7 * 86400
HOUR = 3600
FIRST_ANSWER = 2.6  # seconds that mirrors may keep one run of dnf waiting for their heads
PATIENCE = 300.0  # seconds for everything
_MIRRORS = 2  # of a metalink or mirrorlist
_SMALL = 4 << 20  # bytes of a metalink, repomd.xml or log that are read

# The basic types; what dnf took before is added by `tidings stage`.
DNF4 = ("primary", "group", "updateinfo", "modules", "prestodelta")
DNF5 = ("primary", "group", "updateinfo", "modules")


class Quiet(Exception):
    """Nothing to do here: dnf goes on as without us."""


# -- settings --------------------------------------------------------------------------------------


class Settings:
    """The INI file, read once. One that cannot be used switches Tidings off; nothing is raised.

    *warn(text)* gets a line for each mistake in it; without *warn* they go to dnf 4's log.
    """

    def __init__(self, path=CONFIG, warn=None):
        self.enabled = True
        self.command = "tidings"
        self.timeout = PATIENCE
        self.repos = {}
        self.broken = False  # then nobody is asked
        self.mistakes = []
        self.waits = FIRST_ANSWER  # seconds that mirrors may still keep this run waiting
        try:
            with open(path, "rb") as file:
                self._take(file.read(_SMALL))
        except FileNotFoundError:
            pass
        except (OSError, ValueError, configparser.Error) as error:
            self.enabled, self.broken, self.repos = False, True, {}
            self.mistakes = [_mistake(error) + "; Tidings is off until this is mended"]
        warn = warn or logging.getLogger("dnf.plugin").warning
        for text in self.mistakes:
            warn(f"tidings: {path}: {text}")

    def _take(self, data):
        """Raises ValueError and configparser.Error."""
        text = data.decode("utf-8").lstrip("\ufeff")
        parser = configparser.ConfigParser(
            delimiters=("=",),  # ids of Copr's repositories have colons
            inline_comment_prefixes=(";", "#"),  # after a blank only, as in "off ; why"
            strict=False,  # the last one counts, as with dnf
            empty_lines_in_values=False,
            default_section="\n",  # there is none
            interpolation=None,
        )
        parser.optionxform = str  # ids of repositories have upper case
        parser.read_string(text)
        main = dict(parser.items("main")) if parser.has_section("main") else {}
        enabled = main.get("enabled", "1").lower()
        if enabled not in parser.BOOLEAN_STATES:
            raise ValueError(_place(text, "main", "enabled") + f"{enabled[:80]!r} is not 0 or 1")
        self.enabled = parser.BOOLEAN_STATES[enabled]
        self.command = main.get("command", self.command)
        if not self.command:
            raise ValueError(_place(text, "main", "command") + "no command")
        seconds = main.get("timeout", str(PATIENCE))
        try:
            self.timeout = float(seconds)
        except ValueError:
            self.timeout = 0.0
        if not 0 < self.timeout <= WEEK:  # nor NaN
            place = _place(text, "main", "timeout")
            raise ValueError(place + f"{seconds[:80]!r} is no time in seconds")
        for repo_id, value in parser.items("repos") if parser.has_section("repos") else ():
            if value.lower() not in ("", "on", "auto", "off") and not _BASE_URL.match(value):
                shown = without_secrets(value)[:200]
                self.mistakes.append(
                    _place(text, "repos", repo_id)
                    + f"{shown!r} is neither off nor an http(s) URL; taken as off"
                )
                value = "off"
            self.repos[repo_id] = value

    def of_repo(self, repo_id):
        """The text for a repository: a URL, ``off``, or None. Exact names go over patterns."""
        if self.broken:
            return "off"
        if repo_id in self.repos:
            return self.repos[repo_id]
        for pattern in sorted(self.repos, key=len, reverse=True):
            if fnmatch.fnmatchcase(repo_id, pattern):
                return self.repos[pattern]
        return None


_BASE_URL = re.compile(r"https?://[^\s/?#]+(/[^\s?#]*)?$", re.IGNORECASE)


def _place(text, section, key):
    """``line 3: key: `` of the last such line in an INI file."""
    here, found = "", 0
    for number, line in enumerate(text.split("\n"), 1):
        if re.match(r"\[[^]]+\]", line.strip()):
            here = line.strip()[1:].partition("]")[0]
        elif here == section and line.partition("=")[0].strip() == key:
            found = number
    return f"line {found}: {key}: "


def _mistake(error):
    """What is wrong with an INI file, and in which line, in one line."""
    if isinstance(error, UnicodeDecodeError):
        return "line {}: not UTF-8".format(error.object.count(b"\n", 0, error.start) + 1)
    if isinstance(error, configparser.ParsingError):
        number = getattr(error, "lineno", None)  # one before the first section
        if number is None:
            number = error.errors[0][0] if error.errors else "?"
        return f"line {number}: neither [section] nor name = value"
    if isinstance(error, OSError):
        return str(error.strerror)
    return str(error).split("\n")[0]


# -- where to ask ----------------------------------------------------------------------------------


class Source:
    """A repository as dnf has it configured; all texts with dnf's variables filled in."""

    def __init__(self, repo_id, baseurls=(), metalink=None, mirrorlist=None, live=None):
        self.repo_id = repo_id
        self.baseurls = list(baseurls)
        self.metalink = metalink
        self.mirrorlist = mirrorlist
        self.live = live  # dnf's folder of this repository

    def candidates(self, settings, variables=None):
        """Base URLs to ask, in order, and whether they are the repository's own hosts.

        Raises Quiet where the settings say so or there is nobody to ask.
        """
        text = settings.of_repo(self.repo_id)
        if text is not None:
            if text.lower() == "off":
                raise Quiet("switched off in the configuration")
            if text.lower() not in ("", "on", "auto"):
                return [_substitute(text, variables or {}).rstrip("/")], False
        announced = [url for url in tags_of(self.live) if url]
        if announced:
            return announced[:_MIRRORS], False
        if self.metalink or self.mirrorlist:
            # Only those that dnf has on disk: no request is made for a list.
            urls = [url for url in mirrors_of(self.live) if url.startswith("https://")]
        else:
            urls = [url for url in self.baseurls if url.startswith(("http://", "https://"))]
        if not urls:
            raise Quiet("no mirror to ask")
        if any(url != without_secrets(url) for url in urls):
            raise Quiet("it needs credentials, which only dnf itself sends")
        return [url.rstrip("/") for url in urls[:_MIRRORS]], True


def _substitute(text, variables):
    return re.sub(
        r"\$(?:\{(\w+)\}|(\w+))",
        lambda match: str(variables.get(match.group(1) or match.group(2), match.group(0))),
        text,
    )


def _read(path, limit=_SMALL):
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
    except OSError:
        return None
    return data if len(data) <= limit else None


def _parse(data):
    """An XML tree, or None. A document type is refused: nothing here needs entities."""
    if data is None or b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        return None
    try:
        return xml.etree.ElementTree.fromstring(data)  # noqa: S314 (without entities)
    except (xml.etree.ElementTree.ParseError, ValueError, LookupError):
        return None


def _local(element):
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def mirrors_of(live):
    """Base URLs of the mirrors that dnf's cache names, preferred ones first."""
    if live is None:
        return []
    tree = _parse(_read(os.path.join(live, "metalink.xml")))
    found = []
    if tree is not None:
        for element in tree.iter():
            if _local(element) != "url" or not element.text:
                continue
            url = element.text.strip()
            if url.endswith("/" + REPOMD):
                with contextlib.suppress(ValueError):
                    found.append((-int(element.get("preference", "0")), len(found), url))
        return [url[: -len("/" + REPOMD)] for _, _, url in sorted(found)]
    lines = (_read(os.path.join(live, "mirrorlist")) or b"").decode("utf-8", "replace").split("\n")
    return [line.strip() for line in lines if re.match(r"https?://\S+$", line.strip())]


def tags_of(live):
    """What repomd.xml's content tags say: URLs of ``tidings+https://...``, and "" for ``tidings``.

    dnf has confirmed this file, so it is as good as the repository itself.
    """
    if live is None:
        return []
    tree = _parse(_read(os.path.join(live, REPOMD)))
    found = []
    for element in tree.iter() if tree is not None else ():
        text = (element.text or "").strip() if _local(element) == "content" else ""
        if text == "tidings":
            found.append("")
        elif re.match(r"tidings\+https?://\S+$", text):
            found.append(text[len("tidings+") :].rstrip("/"))
    return found


# -- what is remembered ----------------------------------------------------------------------------


class Memory:
    """Mirrors that are not asked for a while. A broken or missing file remembers nothing."""

    def __init__(self, folder, now=None):
        self.path = os.path.join(folder, "mirrors.json")
        self.now = time.time() if now is None else now
        self.until = {}
        try:
            value = json.loads((_read(self.path) or b"{}").decode("utf-8"))
            self.until = {
                str(url): float(when)
                for url, when in value.items()
                if self.now < float(when) <= self.now + 2 * WEEK
            }
        except (ValueError, AttributeError, TypeError):
            pass  # it is written anew

    def skips(self, url):
        """Whether *url*, or its whole host, is not worth asking now."""
        return url in self.until or _host(url) in self.until

    def learn(self, url, reason):
        """Remember why *url* gave nothing: a word of `tidings stage`, or ``unconfirmed``."""
        if reason == "missing":
            self.until[url] = self.now + WEEK * random.uniform(0.8, 1.2)
        elif reason == "hangs":
            self.until[_host(url)] = self.now + HOUR * random.uniform(0.2, 0.4)
        elif reason in ("refused", "unconfirmed", "useless"):
            self.until[url] = self.now + HOUR * random.uniform(0.8, 1.2)
        else:
            return
        with contextlib.suppress(OSError):  # then it is found out again
            write(self.path, json.dumps(self.until, sort_keys=True))


def _host(url):
    return "/".join(url.split("/")[:3])


def write(path, text):
    """Replace a small file atomically."""
    handle, name = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".tmp-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.rename(name, path)
    except BaseException:
        os.unlink(name)
        raise


def record(folder, facts):
    """Add a line to the log of what was saved; `tidings doctor --dnf` reads it."""
    path = os.path.join(folder, "saved.jsonl")
    with contextlib.suppress(OSError):  # a log that cannot be written harms nobody
        if os.path.exists(path) and os.path.getsize(path) > 1 << 20:
            os.rename(path, path + ".1")
        with open(path, "a") as file:
            file.write(json.dumps(facts, sort_keys=True) + "\n")


def saved(repo_id, program, summary):
    """The line for ``record``."""
    return {
        "v": 1,
        "time": int(time.time()),
        "repo": repo_id,
        "program": program,
        "url": without_secrets(str(summary.get("url"))),
        "route": summary.get("route"),
        "bytes": summary.get("bytes_received", 0) + summary.get("bytes_sent", 0),
        "requests": summary.get("requests", 0),
        "bytes_full": summary.get("bytes_full", 0),
        # What dnf would have asked for: each file of repodata but repomd.xml and its signature.
        "requests_full": sum(
            1
            for f in summary.get("files", ())
            if f.get("type") not in ("repomd", "signature", "key")
        ),
    }


def proxy(url, user, password):
    """dnf's proxy options as one URL; empty for ``_none_``, which is no proxy at all."""
    if url == "_none_":
        return ""
    if not user:
        return url
    scheme, _, rest = url.rpartition("://")
    secrets = urllib.parse.quote(user, "") + ":" + urllib.parse.quote(password or "", "")
    return "{}://{}@{}".format(scheme or "http", secrets, rest)


def without_secrets(url):
    """*url* without a user's name and password."""
    return re.sub(r"^(\w+://)[^/@]*@", r"\1", url)


# -- two folders -----------------------------------------------------------------------------------
#
# What a mirror sends is written to the *staged* folder, whose names it may choose. dnf is pointed
# at the *scratch* folder: it holds plain files in repodata/, put there by ``hand_over``, and what
# dnf itself makes: keys (pubring), solv files and lists of mirrors are never a mirror's.


def folders(live):
    """The scratch folder and the staged folder of the repository whose cache folder is *live*."""
    base = os.path.join(os.path.dirname(live), SCRATCH)
    return (
        os.path.join(base, os.path.basename(live)),
        os.path.join(base, STAGED, os.path.basename(live)),
    )


def forget(folder):
    """Take a folder away, and all in it."""
    if os.path.islink(folder):
        with contextlib.suppress(OSError):
            os.unlink(folder)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def clear(staged):
    """Take away all that looks like metadata, and leave ``.tidings``, which serves the next run."""
    for name in _names(staged):
        if name == ".tidings":
            continue
        path = os.path.join(staged, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.unlink(path)


def hand_over(staged, scratch):
    """Make the scratch folder anew, with the staged repodata/. Raises Quiet, OSError.

    What is not a plain file there is refused with all the rest.
    """
    repodata = os.path.join(staged, REPODATA)
    for folder in (staged, repodata):
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise Quiet("what was staged is no folder")
    for name in os.listdir(repodata):
        if not stat.S_ISREG(os.lstat(os.path.join(repodata, name)).st_mode):
            raise Quiet("what was staged is not flat")
    prepare(scratch)
    os.rename(repodata, os.path.join(scratch, REPODATA))
    clear(staged)


def _names(folder):
    try:
        return os.listdir(folder)
    except OSError:
        return []


def make_room(folder):
    """Make the folder that *folder* is to lie in. Raises Quiet: a read-only cache."""
    try:
        os.makedirs(os.path.dirname(folder), mode=0o755, exist_ok=True)
    except OSError as error:
        raise Quiet(f"no scratch folder: {error}") from error


def prepare(folder, keep=()):
    """Make a folder of ours, empty but for *keep*. Raises Quiet: a read-only cache."""
    if not keep:
        forget(folder)
    try:
        os.makedirs(folder, mode=0o755, exist_ok=True)
    except OSError as error:
        raise Quiet(f"no scratch folder: {error}") from error
    if os.path.islink(folder) or not os.access(folder, os.W_OK):
        raise Quiet(f"{folder} is not usable")
    if keep:
        clear(folder)
    if set(_names(folder)) - set(keep):
        raise Quiet(f"{folder} cannot be cleared")


def copy_fresh(source, target):
    """Copy a folder's plain files as new ones: no attributes, no times, no links."""
    os.mkdir(target)
    for name in sorted(os.listdir(source)):
        shutil.copyfile(os.path.join(source, name), os.path.join(target, name))


def move_in(scratch, live, names=(REPODATA,)):
    """Put the scratch folder's *names* where dnf looks, each in one step where the system can.

    Raises OSError.
    """
    os.makedirs(live, exist_ok=True)
    for name in names:
        new, old = os.path.join(scratch, name), os.path.join(live, name)
        if not os.path.exists(new) or os.path.islink(new):
            continue
        if os.path.isdir(old):
            if _exchange(new, old):
                continue
            # Not atomic: between the two dnf has no cache, as while it replaces one itself.
            os.rename(old, os.path.join(scratch, ".old-" + name))
        os.rename(new, old)


def _exchange(first, second):
    """Swap two names atomically with renameat2(2). False where the system has it not."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    here = ctypes.c_int(-100)  # AT_FDCWD
    done = rename(here, os.fsencode(first), here, os.fsencode(second), ctypes.c_uint(2))
    return done == 0


def digest(path):
    """The SHA-256 of a file in hexadecimal, None where there is none."""
    import hashlib

    data = _read(path, 64 << 20)
    return None if data is None else hashlib.sha256(data).hexdigest()


# -- the command -----------------------------------------------------------------------------------


def stage(settings, request, tell=None):
    """Run `tidings stage` and return its summary. Raises Quiet when there is none.

    *tell(done, total)* gets bytes as they arrive. The command ends when its standard input does,
    so it never outlives dnf; whatever happens here, it is gone when this returns. What it waits for
    mirrors that hang is taken from ``settings.waits``, so that many of them cost no more than one.
    """
    started = time.monotonic()
    if settings.waits < FIRST_ANSWER / 4:
        raise Quiet("mirrors have kept this run waiting long enough")
    # Not a pipe: dnf dies of SIGPIPE, and a socket can be written to without.
    near, far = socket.socketpair()
    try:
        child = subprocess.Popen(
            [settings.command, "stage"],
            stdin=far,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            close_fds=True,
        )
    except OSError as error:
        near.close()
        raise Quiet(f"{settings.command} cannot be started: {error.strerror}") from error
    finally:
        far.close()
    try:
        near.settimeout(settings.waits)
        with contextlib.suppress(OSError):  # its silence says enough
            near.sendall(json.dumps(request).encode("utf-8") + b"\n", socket.MSG_NOSIGNAL)
        answered = ready = False
        limit = [started + settings.waits]
        for event in _events(child.stdout, limit):
            kind = event.get("type")
            ready = True
            if kind == "head" and not answered:
                answered = True
                limit[0] = started + settings.timeout
            elif kind == "progress" and tell is not None:
                tell(event.get("done") or 0, event.get("total") or 0)
            elif kind == "summary":
                if "hangs" in (event.get("tried") or {}).values():
                    settings.waits -= time.monotonic() - started
                if event.get("staged") and not isinstance(event.get("url"), str):
                    raise Quiet(f"{settings.command} does not say where it was")
                return event
            elif kind == "error":
                raise Quiet(str((event.get("error") or {}).get("message")))
        if time.monotonic() >= limit[0]:
            if not ready:  # this machine is slow, not a mirror
                raise Quiet(f"{settings.command} takes long to start")
            settings.waits -= time.monotonic() - started
            return {
                "staged": False,
                "tried": dict.fromkeys(request["urls"], "hangs"),
                "texts": dict.fromkeys(request["urls"], "no answer in time"),
            }
        raise Quiet(f"{settings.command} said nothing")
    finally:
        near.close()
        _end(child)


def _events(stream, limit):
    """JSON objects, a line each, until the stream ends or ``limit[0]`` (time.monotonic) is past."""
    number = stream.fileno()
    rest = b""
    while True:
        left = limit[0] - time.monotonic()
        if left <= 0 or not select.select([number], [], [], left)[0]:
            return
        data = os.read(number, 65536)
        if not data or len(rest) > 1 << 24:
            return
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line.decode("utf-8"))
                if isinstance(event, dict):
                    yield event


def _end(child):
    child.stdout.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(0.2)
        return
    with contextlib.suppress(OSError):
        child.send_signal(signal.SIGKILL)  # it may be killed at any point, and loses nothing
    child.wait()


def verdict(summary):
    """The level and the text of the one log line about mirrors that gave nothing, or None."""
    texts = summary.get("texts") or {}
    levels = {"refused": "WARNING", "hangs": "INFO", "local": "INFO"}
    told = [
        (
            levels.get(reason, "DEBUG"),
            f"{without_secrets(url)}: {str(texts.get(url, reason))[:300]}",
        )
        for url, reason in sorted((summary.get("tried") or {}).items())
    ]
    order = ("DEBUG", "INFO", "WARNING")
    return max(told, key=lambda each: order.index(each[0])) if told else None
