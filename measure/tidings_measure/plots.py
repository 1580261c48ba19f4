"""The pictures, PNG: bytes by lag and tool, what mirrors pay, bytes over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tidings_client.progress import size_text

from .results import Results
from .table import churned, leading_lag, measured_lags

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#1f2933"
_QUIET = "#7b8794"
_GRID = "#e4e7eb"
_OWN = "#c2410c"
#: From the shortest lag to from nothing: one hue, darker for the shorter.
_LAGS = ("#0b3c5d", "#328cc1", "#8cbcd8", "#b8c0c8")
_OWN_LAGS = ("#9a3412", "#ea580c", "#fb923c", "#fdba74")
_DPI = 130


def draw(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Draw what the results have: title and file of each picture."""
    made = []
    for title, name, make in (
        ("Bytes for one update, by tool and by how often a client updates", "bytes", by_lag),
        ("What one publish costs a mirror", "churn", churn),
        ("Bytes for an update at each publish", "time", over_time),
    ):
        figure = make(results)
        if figure is None:
            continue
        target = folder / f"{name}.png"
        figure.savefig(target, dpi=_DPI, facecolor="white", bbox_inches="tight", pad_inches=0.15)
        made.append((title, target))
    return made


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for axis in axes:
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        axis.spines["bottom"].set_color(_GRID)
        axis.tick_params(colors=_QUIET, length=0, labelsize=9)
        axis.set_axisbelow(True)
    return figure, list(axes)


def _sizes(axis: Axes, low: float, high: float, *, vertical: bool = False) -> None:
    """A log axis of bytes with a label at each power of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    line: Any = axis.yaxis if vertical else axis.xaxis
    (axis.set_yscale if vertical else axis.set_xscale)("log")
    (axis.set_ylim if vertical else axis.set_xlim)(low, high)
    powers = [10.0**power for power in range(13) if low <= 10.0**power <= high]
    if len(powers) < 3:
        powers = [f * p for p in [10.0**n for n in range(13)] for f in (1, 2, 5)]
        powers = [power for power in powers if low <= power <= high]
    line.set_major_locator(FixedLocator(powers))
    line.set_minor_locator(NullLocator())
    line.set_major_formatter(
        FuncFormatter(lambda value, _: size_text(round(value)).replace(".0", ""))
    )
    axis.grid(visible=True, axis="y" if vertical else "x", color=_GRID, linewidth=0.8)


def _title(figure: Figure, text: str, below: str) -> None:
    """Above and below all else: the picture is cut to what is in it when it is saved."""
    inch = 1 / figure.get_size_inches()[1]
    figure.text(
        *(0.01, 1 + 0.12 * inch, text), va="bottom", fontsize=13.5, fontweight="bold", color=_INK
    )
    figure.text(0.01, -0.08 * inch, below, va="top", fontsize=8.5, color=_QUIET)


def by_lag(results: Results) -> Figure | None:
    """A row for each tool, best first; a dot for each lag, on a log scale."""
    lags = measured_lags(results)
    lead = leading_lag(results)
    if lead is None:
        return None
    rows = []
    for tool in results.tools:
        costs = {lag: cost.bytes for lag in lags if (cost := results.mean(tool.name, lag))}
        if costs:
            rows.append((tool, costs))
    rows.sort(key=lambda row: row[1].get(lead, max(row[1].values())), reverse=True)
    figure, (axis,) = _figure(9.2, 1.5 + 0.36 * len(rows))
    every = [size for _, costs in rows for size in costs.values()]
    _sizes(axis, min(every) / 2.5, max(every) * 2.0)
    for place, (tool, costs) in enumerate(rows):
        own = tool.name.startswith("tidings")
        palette = _OWN_LAGS if own else _LAGS
        axis.plot(
            [min(costs.values()), max(costs.values())],
            [place, place],
            color=_OWN_LAGS[3] if own else _GRID,
            linewidth=2,
            zorder=1,
        )
        for number, lag in enumerate(lags):
            if lag in costs:
                color = palette[_shade(number, lag)]
                axis.scatter(costs[lag], place, s=58, color=color, zorder=3, linewidth=0)
        if lead in costs:
            axis.annotate(
                size_text(costs[lead]),
                (costs[lead], place),
                xytext=(0, 6.5),
                textcoords="offset points",
                ha="center",
                fontsize=7.5,
                color=_OWN if own else _INK,
                fontweight="bold" if own else "normal",
            )
    _names(axis, [tool.title for tool, _ in rows], [t.name for t, _ in rows])
    for number, lag in enumerate(lags):
        axis.scatter([], [], s=58, color=_LAGS[_shade(number, lag)], label=_client(lag))
    axis.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=len(lags),
        frameon=False,
        fontsize=9,
        handletextpad=0.1,
        columnspacing=1.4,
        borderpad=0,
        labelcolor=_INK,
    )
    _title(
        figure,
        "What one update costs a client",
        f"Bytes on the wire both ways, headers included, mean; log scale. {results.history}, "
        f"{', '.join(results.types)}.",
    )
    return figure


def _shade(number: int, lag: int) -> int:
    return 3 if lag == 0 else min(number, 2)


def _client(lag: int) -> str:
    if lag == 0:
        return "from nothing"
    return "updates at every publish" if lag == 1 else f"updates every {lag} publishes"


def _names(axis: Axes, titles: Sequence[str], names: Sequence[str]) -> None:
    axis.set_yticks(range(len(titles)), titles, fontsize=10)
    axis.set_ylim(-0.7, len(titles) - 0.2)
    for label, name in zip(axis.get_yticklabels(), names, strict=True):
        own = name.startswith("tidings")
        label.set_color(_OWN if own else _INK)
        label.set_fontweight("bold" if own else "normal")


def churn(results: Results) -> Figure | None:
    """Files, and bytes, that one publish costs a mirror, by tool."""
    rows = []
    for tool, publishes in churned(results):
        count = len(publishes)
        moved = [p.second_tier for p in publishes if p.second_tier is not None]
        rows.append(
            (
                tool,
                sum(p.touched for p in publishes) / count,
                sum(p.bytes for p in publishes) / count,
                sum(moved) / len(moved) if moved else None,
            )
        )
    if not rows:
        return None
    rows.sort(key=lambda row: row[2], reverse=True)
    figure, (files, sizes) = _figure(9.2, 1.5 + 0.34 * len(rows), 2)
    places = range(len(rows))
    colors = [_OWN if tool.name.startswith("tidings") else _LAGS[1] for tool, *_ in rows]
    counts = [row[1] for row in rows]
    files.scatter(counts, list(places), s=58, color=colors, linewidth=0, zorder=3)
    files.set_xscale("log")
    files.set_xlim(0.7, max(20.0, max(counts) * 2.5))
    files.grid(visible=True, axis="x", color=_GRID, linewidth=0.8)
    from matplotlib.ticker import FuncFormatter, NullLocator

    files.xaxis.set_minor_locator(NullLocator())
    files.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for place, touched in enumerate(counts):
        whole = touched >= 10 or touched == int(touched)
        files.annotate(
            f"{touched:.0f}" if whole else f"{touched:.1f}",
            (touched, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=_INK,
        )
    files.set_title("files written, changed or deleted", fontsize=9.5, color=_INK, loc="left")
    both = [value for row in rows for value in row[2:] if value]
    _sizes(sizes, min(both) / 1.6, max(both) * 1.8)
    for place, (_, _, written, moved_) in enumerate(rows):
        if moved_:
            sizes.plot([written, moved_], [place, place], color=_GRID, linewidth=2, zorder=1)
            sizes.scatter(
                moved_,
                place,
                s=52,
                facecolor="white",
                edgecolor=colors[place],
                linewidth=1.6,
                zorder=2,
            )
        sizes.scatter(written, place, s=58, color=colors[place], linewidth=0, zorder=3)
    sizes.set_title(
        "bytes: ● written   ○ moved by a second tier's rsync", fontsize=9.5, color=_INK, loc="left"
    )
    _names(files, [tool.title for tool, *_ in rows], [tool.name for tool, *_ in rows])
    _title(
        figure,
        "What one publish costs a mirror",
        "Beside the published files themselves, which have a row of their own; mean; log scales. "
        f"{results.history}.",
    )
    return figure


def over_time(results: Results) -> Figure | None:
    """A line for each tool: what the client that updates most often paid at each publish."""
    lead = leading_lag(results)
    if not lead:
        return None
    lines = []
    for tool in results.tools:
        updates = results.of(tool.name, lead)
        if len(updates) > 1:
            lines.append((tool, updates))
    if not lines:
        return None
    figure, (axis,) = _figure(9.2, 5.6)
    every = [update.cost.bytes for _, updates in lines for update in updates]
    _sizes(axis, min(every) / 1.5, max(every) * 1.5, vertical=True)
    order = {name: place for place, name in enumerate(results.versions)}
    ends = []
    last = max(order[u.version] for _, updates in lines for u in updates)
    for tool, updates in lines:
        own = tool.name.startswith("tidings")
        places = [order[update.version] for update in updates]
        sizes = [update.cost.bytes for update in updates]
        color = _OWN if own else _LAGS[1]
        axis.plot(
            places,
            sizes,
            color=color,
            linewidth=2.4 if own else 1.2,
            alpha=1.0 if own else 0.75,
            marker="o" if len(places) < 20 else None,
            markersize=3.5,
            zorder=4 if own else 2,
        )
        ends.append((sizes[-1], tool.title, _OWN if own else _INK, own))
    _label_ends(axis, last, ends)
    places = sorted({order[u.version] for _, updates in lines for u in updates})
    step = max(1, len(places) // 8)
    axis.set_xticks(places[::step], [_short(results.versions[p]) for p in places[::step]])
    axis.set_xlim(places[0] - 0.02 * len(places), places[-1] + 0.02 * len(places))
    axis.set_xlabel("publish", fontsize=9, color=_QUIET)
    _title(
        figure,
        "Bytes for an update, over time",
        f"The client that updates {_often(lead)}; log scale. {results.history}, "
        f"{', '.join(results.types)}.",
    )
    return figure


def _often(lag: int) -> str:
    return "at every publish" if lag == 1 else f"every {lag} publishes"


def _short(name: str) -> str:
    return name if len(name) <= 13 else name[:13].rstrip("_-")


def _label_ends(axis: Axes, x: float, ends: Sequence[tuple[float, str, str, bool]]) -> None:
    """Names beside the lines' ends, moved apart where they would touch."""
    from math import exp, log

    low, high = axis.get_ylim()
    gap = (log(high) - log(low)) * 0.034
    placed: list[list[Any]] = [[log(size), *rest] for size, *rest in sorted(ends)]
    at = log(low)
    for entry in placed:
        entry[0] = at = max(entry[0], at + gap)
    over = placed[-1][0] - (log(high) - gap / 2)
    for entry in reversed(placed):
        if over <= 0:
            break
        entry[0] -= over
        below = placed.index(entry) - 1
        over = placed[below][0] - (entry[0] - gap) if below >= 0 else 0
    for value, title, color, own in placed:
        axis.annotate(
            title,
            (x, exp(value)),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=color,
            fontweight="bold" if own else "normal",
            annotation_clip=False,
        )
