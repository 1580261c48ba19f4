"""The tables of a report: what clients pay, and what mirrors pay. As text, Markdown or HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tidings_client.progress import size_text

from .link import Link, site_bytes
from .results import Cost, Publish, Results, Tool


@dataclass(frozen=True, slots=True)
class Models:
    """What is modelled beside what was measured."""

    links: Sequence[Link] = ()
    clients: int = 1
    behind_proxy: bool = False

    @property
    def site(self) -> bool:
        """Whether a site of several clients is modelled."""
        return self.clients > 1 or self.behind_proxy

    def site_bytes(self, cost: Cost) -> int:
        """Bytes on the site's line when all its clients make an update."""
        if self.behind_proxy:
            return site_bytes(cost, self.clients)
        return cost.bytes * self.clients


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, a row of names, and rows of cells; the first column is text, all others are not.

    ``own``: rows to stand out.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    own: frozenset[int] = field(default_factory=frozenset)

    def text(self) -> str:
        """For a terminal."""
        rows = [self.names, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.names))]
        lines = [self.title]
        for number, row in enumerate(rows):
            cells = [row[0].ljust(widths[0])]
            cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            lines.append("  ".join(cells).rstrip())
            if number == 0:
                lines.append("  ".join("-" * width for width in widths))
        return "\n".join(lines)

    def markdown(self) -> str:
        """For a README."""
        lines = [f"| {' | '.join(self.names)} |"]
        lines.append("|" + "|".join(["---"] + ["---:"] * (len(self.names) - 1)) + "|")
        for number, row in enumerate(self.rows):
            cells = [cell.replace("|", "\\|") for cell in row]
            if number in self.own:
                cells = [f"**{cell}**" for cell in cells]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def html(self) -> str:
        """For the report."""
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.names)
        body = "".join(
            f"<tr{' class=own' if number in self.own else ''}>"
            f"<th>{html.escape(row[0])}</th>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
            + "</tr>\n"
            for number, row in enumerate(self.rows)
        )
        return (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n'
            f"<tbody>{body}</tbody></table></div>"
        )


def lag_text(lag: int) -> str:
    """A kind of client, for people."""
    if lag == 0:
        return "from nothing"
    return "every publish" if lag == 1 else f"every {lag}"


def measured_lags(results: Results) -> list[int]:
    """The lags that have updates; from nothing last."""
    found = {update.lag for update in results.updates}
    return sorted(found, key=lambda lag: (lag == 0, lag))


def leading_lag(results: Results) -> int | None:
    """The lag that single figures are about: the shortest that was measured."""
    return next(iter(measured_lags(results)), None)


def clients(results: Results, models: Models) -> Table:
    """What a client pays, in the mean over its updates."""
    lags = measured_lags(results)
    lead = leading_lag(results)
    names = ["tool", *(lag_text(lag) for lag in lags)]
    if lead is not None:
        names += ["requests", "CPU", "wall", "memory"]
        names += [f"at {link.name}" for link in models.links]
        if models.site:
            names.append(_site_name(models))
    rows: list[list[str]] = []
    own = set()
    for tool in results.tools:
        costs = {lag: results.mean(tool.name, lag) for lag in lags}
        if not any(costs.values()):
            continue
        if tool.name.startswith("tidings"):
            own.add(len(rows))
        row = [tool.title]
        row += [size_text(cost.bytes) if cost else "–" for cost in costs.values()]
        cost = costs[lead] if lead is not None else None
        if cost is not None:
            row += [str(cost.requests), f"{cost.cpu:.2f} s", f"{cost.wall:.2f} s"]
            row.append(size_text(cost.peak))
            row += [f"{link.seconds(cost):.2f} s" for link in models.links]
            if models.site:
                row.append(size_text(models.site_bytes(cost)))
        rows.append([*row, *["–"] * (len(names) - len(row))])
    title = "Bytes on the wire for one update, both ways, headers included (mean)"
    if lead is not None and len(lags) > 1:
        title += f"; the columns from requests on: {lag_text(lead)}"
    return Table(title, names, rows, frozenset(own))


def _site_name(models: Models) -> str:
    return f"{models.clients} clients" + (", shared cache" if models.behind_proxy else "")


def modelled(
    results: Results, cell: Callable[[Cost], str], lags: Sequence[int] | None = None
) -> Table:
    """A row for each tool and a column for each lag, with what *cell* makes of the mean cost."""
    lags = measured_lags(results) if lags is None else lags
    rows: list[list[str]] = []
    own = set()
    for tool in results.tools:
        costs = [results.mean(tool.name, lag) for lag in lags]
        if any(costs):
            if tool.name.startswith("tidings"):
                own.add(len(rows))
            rows.append([tool.title, *(cell(cost) if cost else "–" for cost in costs)])
    return Table("", ["tool", *map(lag_text, lags)], rows, frozenset(own))


def churned(results: Results) -> list[tuple[Tool, list[Publish]]]:
    """Tools whose mirrors were looked at. Tidings' mirror is the same behind a static host."""
    found = [(tool, results.churn(tool.name)) for tool in results.tools]
    both = any(tool.name == "tidings" and publishes for tool, publishes in found)
    return [
        (tool, publishes)
        for tool, publishes in found
        if publishes and not (both and tool.name == "tidings-static")
    ]


def mirrors(results: Results) -> Table:
    """What a mirror pays for one publish, in the mean."""
    names = ["tool", "files written", "changed", "deleted"]
    names += ["bytes written", "second tier's rsync", "made in"]
    rows: list[list[str]] = []
    own = set()
    for tool, publishes in churned(results):
        if tool.name.startswith("tidings"):
            own.add(len(rows))
        count = len(publishes)
        moved = [p.second_tier for p in publishes if p.second_tier is not None]
        rows.append(
            [
                tool.title,
                *(
                    _number(sum(values) / count)
                    for values in (
                        [p.written for p in publishes],
                        [p.changed for p in publishes],
                        [p.deleted for p in publishes],
                    )
                ),
                size_text(round(sum(p.bytes for p in publishes) / count)),
                size_text(round(sum(moved) / len(moved))) if moved else "–",
                f"{sum(p.seconds for p in publishes) / count:.1f} s",
            ]
        )
    title = "What one publish costs a mirror, beside the published files themselves (mean)"
    return Table(title, names, rows, frozenset(own))


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 or value == int(value) else f"{value:.1f}"
