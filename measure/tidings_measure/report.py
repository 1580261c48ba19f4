"""The report: one HTML file with everything in it, written to be read from top to bottom."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from tidings_client.progress import size_text

from .results import Cost, Results
from .table import Models, Table, clients, lag_text, leading_lag, mirrors, modelled

_STYLE = """
:root { color-scheme: light; --ink: #1f2933; --quiet: #616e7c; --line: #e4e7eb; --own: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 62rem; color: var(--ink);
  background: #fff; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; }
p, ul, dl { max-width: 46rem; }
.sub { color: var(--quiet); margin: 0 0 1.8rem; }
.key { display: flex; flex-wrap: wrap; gap: 1rem; margin: 1.6rem 0; }
.key div { flex: 1 1 11rem; border-left: 3px solid var(--line); padding: .1rem 0 .1rem .9rem; }
.key div.own { border-color: var(--own); }
.key b { display: block; font-size: 1.6rem; line-height: 1.25; }
.key .own b { color: var(--own); }
.key span { color: var(--quiet); font-size: .9rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; color: var(--quiet); vertical-align: bottom; white-space: normal; }
tbody th { font-weight: 400; }
tr.own th, tr.own td { color: var(--own); font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin: 0; color: var(--quiet); }
details { margin: 1rem 0; } summary { cursor: pointer; color: var(--quiet); }
code { font-size: .88em; background: #f5f7fa; padding: .1em .35em; border-radius: 3px; }
pre { background: #f5f7fa; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
"""


def write(
    results: Results,
    models: Models,
    pictures: Sequence[tuple[str, Path]],
    command: str,
    target: Path,
) -> None:
    """Write the report to *target*, pictures inside."""
    images = {path.stem: _image(title, path) for title, path in pictures}
    one = clients(results, models)
    two = mirrors(results)
    parts = [
        f"<h1>What an update of {html.escape(results.history)} costs</h1>",
        f'<p class="sub">{html.escape(_scope(results))}</p>',
        _key(results),
        "<h2>What a client pays</h2>",
        images.get("bytes", ""),
        _caption(one),
        one.html(),
        _modelled(results, models),
        "<h2>What a mirror pays</h2>",
        images.get("churn", ""),
        _caption(two),
        two.html(),
    ]
    if "time" in images:
        parts += ["<h2>Over time</h2>", images["time"]]
    parts += [_method(results, command), _details(results)]
    title = html.escape(f"What an update of {results.history} costs")
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )
    target.write_text(page, encoding="utf-8")


def summary(results: Results) -> str:
    """The result in a line, with no more than was measured."""
    lead = leading_lag(results)
    if lead is None:
        return "nothing was measured"
    ours = results.mean("tidings", lead) or results.mean("tidings-static", lead)
    whole = results.mean("published", lead)
    if ours is None or whole is None:
        return f"{len(results.updates)} updates measured"
    text = f"{_who(lead)}: {size_text(ours.bytes)} in {_requests(ours)} with Tidings, "
    return text + f"{size_text(whole.bytes)} as published ({whole.bytes / ours.bytes:.0f} times)"


def _requests(cost: Cost) -> str:
    return f"{cost.requests} request{'' if cost.requests == 1 else 's'}"


def _who(lag: int) -> str:
    return "from nothing" if lag == 0 else f"a client that updates {_often(lag)}"


def _often(lag: int) -> str:
    return "at every publish" if lag == 1 else f"every {lag} publishes"


def _scope(results: Results) -> str:
    first, last = results.versions[0], results.versions[-1]
    return (
        f"{len(results.versions)} publishes, {first} to {last}; metadata: "
        f"{', '.join(results.types)}; {len(results.updates)} updates measured over loopback."
    )


def _key(results: Results) -> str:
    """Three or four figures that say it."""
    lead = leading_lag(results)
    if lead is None:
        return ""
    ours = results.mean("tidings", lead) or results.mean("tidings-static", lead)
    rivals = {
        tool.title: cost
        for tool in results.tools
        if not tool.name.startswith("tidings") and (cost := results.mean(tool.name, lead))
    }
    cells = []
    if ours is not None:
        text = f"Tidings, {_often(lead) if lead else 'from nothing'}, in {_requests(ours)}"
        cells.append(f'<div class="own"><b>{size_text(ours.bytes)}</b><span>{text}</span></div>')
    whole = results.mean("published", lead)
    if whole is not None:
        times = f", {whole.bytes / ours.bytes:.0f} times as much" if ours else ""
        cells.append(
            f"<div><b>{size_text(whole.bytes)}</b><span>the files as published{times}</span></div>"
        )
    rivals.pop("as published", None)
    if rivals:
        title, best = min(rivals.items(), key=lambda item: item[1].bytes)
        times = f", {best.bytes / ours.bytes:.1f} times as much" if ours else ""
        cells.append(
            f"<div><b>{size_text(best.bytes)}</b><span>the best other tool: "
            f"{html.escape(title)}{times}</span></div>"
        )
    churn = results.churn("tidings") or results.churn("tidings-static")
    if churn:
        files = sum(p.touched for p in churn) / len(churn)
        size = size_text(round(sum(p.bytes for p in churn) / len(churn)))
        cells.append(
            f'<div class="own"><b>{files:.0f} files</b><span>change on a mirror at each publish, '
            f"{size} in all</span></div>"
        )
    return f'<div class="key">{"".join(cells)}</div>' if cells else ""


def _caption(table: Table) -> str:
    return f"<p>{html.escape(table.title)}.</p>"


def _image(title: str, path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def _modelled(results: Results, models: Models) -> str:
    """Seconds on lines and bytes of a site, for every lag."""
    parts = []
    for link in models.links:
        table = modelled(results, lambda cost, link=link: f"{link.seconds(cost):.2f} s")  # type: ignore[misc]
        parts.append(
            f"<h2>On a line of {link.rate / 1e6:g} Mbit/s and {link.delay * 1000:g} ms</h2>"
            "<p>Modelled: round trips one after another, then the bytes at full rate, then the CPU "
            f"seconds that were measured. TCP's slow start is left out.</p>{table.html()}"
        )
    if models.site:
        table = modelled(results, lambda cost: size_text(models.site_bytes(cost)))
        text = f"Modelled: bytes on the site's line when all {models.clients} make the update."
        if models.behind_proxy:
            text += (
                " What a shared cache holds crosses it once: whole objects that are hash-named or "
                "that their server calls fresh. Ranges and revalidated answers cross it each time."
            )
        parts.append(f"<h2>A site of {models.clients} clients</h2><p>{text}</p>{table.html()}")
    return "".join(parts)


_HOW = """<h2>How it was measured</h2>
<p>Each tool replays the publishes one after another. Its own server and its own client run on this
machine and talk through a proxy that counts every byte both ways, headers included, and every
request. Every result is compared with the published file. CPU, wall time and memory are those of
the client's processes (memory: what needs less than 9 MB is shown with about that).</p>
<p>In the rivals' favour: they are told for free which files are new and what they are called, while
Tidings' figures hold its head and repomd.xml; they are not charged for compressing contents back to
the published files; delta programs get a direct delta from whatever a client has, and their mirrors
are charged for that of the last publish only.</p>
"""


def _method(results: Results, command: str) -> str:
    part = [tool for tool in results.tools if tool.left_out is None]
    out = [f"{tool.title}: {tool.left_out}" for tool in results.tools if tool.left_out is not None]
    tools = "".join(
        f"<dt>{html.escape(tool.title)}</dt><dd>{html.escape(tool.about)}"
        f"{html.escape(f' ({tool.version})' if tool.version else '')}</dd>"
        for tool in part
    )
    about = ", ".join(f"{key} {value}" for key, value in results.about.items())
    return (
        _HOW
        + _list("Left out, because it is not on this machine:", out)
        + _list("Notes:", results.notes)
        + f"<h2>The tools</h2><dl>{tools}</dl>"
        + f"<h2>Made by</h2><pre>{html.escape(command)}</pre><p class=sub>{html.escape(about)}</p>"
    )


def _list(heading: str, lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return f"<p>{html.escape(heading)}</p><ul>{items}</ul>" if lines else ""


def _details(results: Results) -> str:
    rows = [
        [
            update.tool,
            lag_text(update.lag),
            update.base or "–",
            update.version,
            f"{update.cost.received:,}",
            f"{update.cost.sent:,}",
            str(update.cost.requests),
            f"{update.cost.cpu:.2f}",
            f"{update.cost.wall:.2f}",
            size_text(update.cost.peak),
            update.note,
        ]
        for update in results.updates
    ]
    names = ["tool", "client", "from", "to", "bytes received", "bytes sent", "requests"]
    names += ["CPU s", "wall s", "memory", "note"]
    table = Table("", names, rows)
    return f"<details><summary>All {len(rows)} updates</summary>{table.html()}</details>"
