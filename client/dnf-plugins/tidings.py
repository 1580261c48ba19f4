"""dnf 4 gets metadata through Tidings, and judges it as ever. Standard library only, Python 3.6.

Each repository's ``load`` is wrapped. Where dnf is about to use the network, newer metadata is
staged in a scratch cache folder, and dnf's own load is pointed at it as at an expired cache: it
checks every file against repomd.xml, signatures against its own keys, and asks the origin (or the
metalink) whether this repomd.xml is the current one. Only what passed that is moved into dnf's
cache. Whatever else happens, dnf's own load runs as if this plugin were not there.
"""

import contextlib
import logging
import os
import sys

import dnf.exceptions
import dnf.repo
import libdnf.conf

import dnf

# The shared part lies beside this file in a checkout, and in libexec where packages put it.
for _folder in ("/usr/libexec/tidings", os.path.dirname(os.path.realpath(__file__))):
    if os.path.exists(os.path.join(_folder, "tidings_dnf.py")) and _folder not in sys.path:
        sys.path.insert(0, _folder)

import tidings_dnf as common  # noqa: E402 (found by the lines above)

logger = logging.getLogger("dnf.plugin")


class Tidings(dnf.Plugin):
    """Wraps the load of each repository that dnf has read."""

    name = "tidings"

    def __init__(self, base, cli):
        super().__init__(base, cli)
        self.base = base

    @classmethod
    def read_config(cls, conf):
        """``enabled`` by our rules: where the file has a mistake, dnf's own reader ends dnf."""
        settings = _settings(conf, warn=lambda text: None)  # ``config`` tells it
        parser = libdnf.conf.ConfigParser()
        parser.addSection("main")
        parser.setValue("main", "enabled", "1" if settings.enabled or settings.broken else "0")
        return parser

    def config(self):
        """Repositories are known here and none is loaded yet."""
        settings = _settings(self.base.conf)
        for repo in self.base.repos.values():  # some are enabled later
            _wrap(repo, self.base.conf, settings)


def _settings(conf, warn=None):
    """The first tidings.conf of dnf's folders for them."""
    for folder in conf.pluginconfpath:
        path = os.path.join(folder, "tidings.conf")
        if os.path.exists(path):
            return common.Settings(path, warn)
    return common.Settings(warn=warn)


def _wrap(repo, conf, settings):
    """Replace ``repo.load``; a repository enabled twice is wrapped once."""
    plain = repo.load
    if getattr(plain, "tidings", False):
        return

    def load():
        work = None
        try:
            work = _begin(repo, conf, settings)
        except common.Quiet as reason:
            logger.debug("tidings: %s: %s", repo.id, reason)
        except Exception as error:  # noqa: BLE001 a bug of ours is no reason to go without metadata
            logger.warning("tidings: %s: %s: %s", repo.id, type(error).__name__, error)
        # Not within the except: dnf's own errors would be told as if they came of ours.
        return plain() if work is None else work.confirm(plain)

    load.tidings = True
    repo.load = load


def _begin(repo, conf, settings):
    """Stage newer metadata where dnf is about to use the network. Raises Quiet otherwise."""
    strategy = repo._repo.getSyncStrategy()
    if strategy == dnf.repo.SYNC_ONLY_CACHE or conf.cacheonly:
        raise common.Quiet("dnf uses its cache only")
    if repo._repo.isLocal():
        raise common.Quiet("a local repository")
    if getattr(repo, "metadata", None) is not None and not repo._repo.isExpired():
        raise common.Quiet("already loaded")
    live = repo._repo.getCachedir()
    cached = os.path.exists(os.path.join(live, common.REPOMD)) and repo._repo.loadCache(False)
    if cached and (strategy == dnf.repo.SYNC_LAZY or not _expired(repo, conf)):
        raise common.Quiet("dnf uses its cache")
    urls, settings_for_host = _whom_to_ask(repo, settings, live)
    scratch, staged = common.folders(live)
    common.prepare(staged, keep=(".tidings",))
    memory = common.Memory(os.path.dirname(scratch))
    urls = [url for url in urls if not memory.skips(url)]
    if not urls:
        raise common.Quiet("its mirrors are not asked for a while")
    request = {
        "v": 1,
        "urls": urls,
        "dest": staged,
        "live": live if cached else None,
        "types": _types(repo, conf),
        "zchunk": _zchunk(conf),
    }
    request.update(settings_for_host)
    with _bar(repo) as tell:
        summary = common.stage(settings, request, tell)
    for url, reason in (summary.get("tried") or {}).items():
        memory.learn(url, reason)
    told = common.verdict(summary)
    if told is not None:
        logger.log(getattr(logging, told[0]), "tidings: %s: %s", repo.id, told[1])
    if not summary.get("staged"):
        if "local" in (summary.get("tried") or {}).values():
            common.forget(staged)  # dnf may want the room
        raise common.Quiet("nothing staged")
    try:
        common.hand_over(staged, scratch)
    except (common.Quiet, OSError) as error:
        common.forget(staged)
        common.forget(scratch)
        memory.learn(summary["url"], "refused")
        raise common.Quiet(str(error)) from error
    return _Work(repo, strategy, live, scratch, staged, bool(cached), memory, summary)


def _whom_to_ask(repo, settings, live):
    """URLs, and what of the repository's settings goes to them. Raises Quiet."""
    source = common.Source(repo.id, list(repo.baseurl or ()), repo.metalink, repo.mirrorlist, live)
    urls, own = source.candidates(settings, repo._substitutions)
    if not own:
        return urls, {}  # another host: nothing that belongs to this one
    if repo.username or repo.password or repo.sslclientcert or repo.get_http_headers():
        raise common.Quiet("it needs credentials, which only dnf itself sends")
    if not repo.sslverify and urls[0].startswith("https:"):
        raise common.Quiet("sslverify is off, which Tidings does not do")
    sent = {}
    if repo.sslcacert:
        sent["cafile"] = repo.sslcacert
    if repo.proxy:
        sent["proxy"] = common.proxy(repo.proxy, repo.proxy_username, repo.proxy_password)
    return urls, sent


def _expired(repo, conf):
    """Whether dnf's load would ask the network: libdnf's resetMetadataExpired."""
    if repo._repo.isExpired():
        return True
    if repo.metadata_expire == -1 or not conf.check_config_file_age or not repo.repofile:
        return False
    primary = repo.get_metadata_path("primary")
    with contextlib.suppress(OSError):
        return os.stat(repo.repofile).st_mtime > os.stat(primary).st_mtime
    return False


def _types(repo, conf):
    types = list(common.DNF4)
    optional = getattr(conf, "optional_metadata_types", None)
    if optional is None or "filelists" in optional:  # older dnf always wants them
        types.append("filelists")
    if repo.load_metadata_other:
        types.append("other")
    return types


def _zchunk(conf):
    """Whether this dnf takes zchunk files: the option, and a librepo that is linked with it."""
    if not getattr(conf, "zchunk", True):
        return False
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        return any("libzck" in line for line in maps)
    return False


@contextlib.contextmanager
def _bar(repo):
    """dnf's own progress bar for this repository; yields a function of bytes done and in all."""
    payload = repo._md_pload
    shown = []

    def tell(done, total):
        if not shown:
            payload.start("%s (tidings)" % (repo.name or repo.id))
            shown.append(True)
        payload._progress_cb(None, total, done)

    try:
        yield tell
    finally:
        if shown:
            payload.end()


class _Work:
    """Staged metadata on its way through dnf's own judgement."""

    def __init__(self, repo, strategy, live, scratch, staged, cached, memory, summary):
        self.repo = repo
        self.strategy = strategy
        self.live = live
        self.scratch = scratch
        self.staged = staged
        self.cached = cached
        self.memory = memory
        self.summary = summary

    def confirm(self, plain):
        """dnf's load on the scratch folder; then into the cache, or dnf's load as ever."""
        given = common.digest(os.path.join(self.scratch, common.REPOMD))
        try:
            fresh = self._load_scratch(plain)
        except dnf.exceptions.RepoError as error:
            # The origin does not answer, or this machine has no room for two copies: without the
            # scratch folder dnf finds out which.
            logger.debug("tidings: %s: %s", self.repo.id, error)
            fresh = None
        except Exception as error:  # noqa: BLE001 what a mirror sent never ends dnf's run
            logger.warning("tidings: %s: %s", self.repo.id, error)
            self.memory.learn(self.summary["url"], "refused")
            fresh = None
        except BaseException:
            self._restore()
            raise
        if fresh is None:
            return self._without(plain)
        confirmed = given == common.digest(os.path.join(self.scratch, common.REPOMD))
        moved = True
        try:
            common.move_in(
                self.scratch, self.live, ("pubring", "metalink.xml", "mirrorlist", common.REPODATA)
            )
        except OSError as error:
            logger.warning("tidings: %s: %s", self.repo.id, error)
            moved = False
        if not moved:
            return self._without(plain)
        self._point_at(self.live)
        self.repo._repo.setSyncStrategy(self.strategy)
        loaded = self.repo._repo.loadCache(False)
        common.forget(self.scratch)
        if not loaded:
            logger.warning("tidings: %s: the cache cannot be read after the move", self.repo.id)
            self.cached = False
            return self._without(plain)
        self._tell(confirmed)
        return fresh

    def _load_scratch(self, plain):
        """dnf's load, which asks the origin. Raises Quiet where dnf refuses what was staged."""
        kept = None
        pubring = os.path.join(self.live, "pubring")
        if os.path.isdir(pubring):
            os.symlink(pubring, os.path.join(self.scratch, "pubring"))
        elif self.repo.repo_gpgcheck:
            # dnf may import its key now, and empties the folder when it does.
            kept = os.path.join(self.scratch, "kept")
            common.copy_fresh(os.path.join(self.scratch, common.REPODATA), kept)
        self._point_at(self.scratch)
        # An expired cache that is used only when the origin says that it is current.
        self.repo._repo.setSyncStrategy(dnf.repo.SYNC_TRY_CACHE)
        taken = self.repo._repo.loadCache(False)
        if not taken and kept is not None:
            repodata = os.path.join(self.scratch, common.REPODATA)
            if not os.path.exists(repodata):
                common.copy_fresh(kept, repodata)
                taken = self.repo._repo.loadCache(False)
        if not taken:
            raise common.Quiet("dnf does not take what the mirror gave")
        self.repo._repo.expire()
        return plain()

    def _without(self, plain):
        """dnf's load as without this plugin."""
        self._restore()
        if self.strategy == dnf.repo.SYNC_LAZY and not self.cached:
            # The repository object still knows the scratch folder's paths, and lazy would use
            # them unseen. Without a cache lazy downloads, which this does.
            self.repo._repo.setSyncStrategy(dnf.repo.SYNC_TRY_CACHE)
        try:
            return plain()
        finally:
            self.repo._repo.setSyncStrategy(self.strategy)

    def _restore(self):
        keys = os.path.join(self.scratch, "pubring")
        if os.path.isdir(keys) and not os.path.islink(keys):
            # dnf made it (``hand_over``): the user has agreed to these keys for this repository.
            with contextlib.suppress(OSError):
                common.move_in(self.scratch, self.live, ("pubring",))
        common.forget(self.scratch)
        common.forget(self.staged)  # refused, or in the way of dnf's own download
        self._point_at(self.live)
        self.repo._repo.setSyncStrategy(self.strategy)
        if self.cached:
            self.repo._repo.loadCache(False)
        self.repo._repo.expire()

    def _point_at(self, folder):
        self.repo.basecachedir = os.path.dirname(folder)

    def _tell(self, confirmed):
        if not confirmed:
            self.memory.learn(self.summary["url"], "unconfirmed")
            logger.info(
                "tidings: %s: the origin has other metadata than the mirror; dnf took the origin's",
                self.repo.id,
            )
            return
        line = common.saved(self.repo.id, "dnf4", self.summary)
        common.record(os.path.dirname(self.scratch), line)
        logger.debug(
            "tidings: %s: %d bytes in %d requests instead of %d bytes",
            self.repo.id,
            line["bytes"],
            line["requests"],
            line["bytes_full"],
        )
