"""Pictures of results: kernels and steps beside floor and peers, many devices beside one."""

import itertools
from importlib import import_module
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, told apart without colour vision; lightness differs too.
COLOURS = {"ours": "#0072B2", "flash-mla": "#E69F00", "page 64": "#56B4E9", "xla": "#999999"}
OTHERS = ("#009E73", "#D55E00", "#CC79A7", "#F0E442")
FORMATS = (".svg", ".png")
SETTINGS = {"svg.fonttype": "none", "font.size": 8}
LABELS = ("op", "layout", "dtype", "backend", "deterministic")
"""What a shape may have rows of several of."""
BAR, GAP = 0.13, 0.13  # inches: a bar's height, and the space between shapes


def check(path: Path) -> None:
    """Before measuring: ImportError without matplotlib, ValueError for another format."""
    if path.suffix not in FORMATS:
        expected = " or ".join(FORMATS)
        raise ValueError(f"plot: got {path.name}, expected a name that ends in {expected}")
    try:
        import_module("matplotlib")
    except ImportError:
        raise ImportError("plot: needs matplotlib: pip install 'mla-jax[notebooks]'") from None


def draw(document: dict[str, Any], path: Path) -> None:
    """Bars of floor time over measured time, by shape, from a results file's content: SVG or PNG.

    1 is a kernel, or a step, that moves or computes at the rates measured in the same run. What
    differs between rows of the same shape, such as the cache's layout, stands beside it. Errors:
    `check`'s.
    """
    check(path)
    import_module("matplotlib").use("agg")
    plt = import_module("matplotlib.pyplot")
    rows = document["rows"]
    ops = sorted({row["op"] for row in rows})
    differing = [key for key in LABELS if len({row.get(key) for row in rows}) > 1]
    groups: dict[str, dict[str, float]] = {}
    floors = {}
    for row in rows:
        label = ", ".join([row["shape"], *(str(row[key]) for key in differing if key in row)])
        micros = row["ours_us"] if "ours_us" in row else row["ms_a_step"] * 1e3
        # Each peer's row times ours anew: the first stands for it.
        times = groups.setdefault(label, {"ours": micros})
        floors.setdefault(label, micros * _share(row))
        if "peer" in row:
            times[row["peer"]] = row["peer_us"]
    unknown = sorted({name for times in groups.values() for name in times} - set(COLOURS))
    colours = COLOURS | dict(zip(unknown, itertools.cycle(OTHERS), strict=False))

    with plt.rc_context(SETTINGS | {"svg.hashsalt": "-".join(ops)}):
        bars = sum(map(len, groups.values()))
        height = BAR * bars + GAP * len(groups)
        figure, axes = plt.subplots(figsize=(7, height + 1), layout="constrained")
        top, ticks = 0.0, []
        for shape, times in groups.items():
            ticks.append(top + BAR * (len(times) - 1) / 2)
            for name in sorted(times, key=list(colours).index):
                share = floors[shape] / times[name]
                axes.barh(top, share, height=BAR * 0.9, color=colours[name], label=name)
                micros = times[name]
                text = f"{micros:,.0f} µs" if micros >= 1000 else f"{micros:.3g} µs"
                axes.text(share + 0.01, top, text, va="center", fontsize=6)
                top += BAR
            top += GAP
        axes.set_yticks(ticks, list(groups))
        axes.set_ylim(top, -GAP - BAR)
        axes.set_xlim(0, 1.12)
        axes.axvline(1, color="black", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_xlabel("floor time / measured time (1: the device's own limit in the same run)")
        axes.set_title(f"{', '.join(ops).replace('_', ' ')}, {document['device']}")
        named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        figure.legend(
            [named[name] for name in colours if name in named],
            [name for name in colours if name in named],
            loc="outside lower center",
            ncols=4,
            frameon=False,
        )
        axes.spines[["top", "right"]].set_visible(False)
        _save(figure, path)
        plt.close(figure)


def _share(row: dict[str, Any]) -> float:
    """Floor time over our time."""
    if "times_floor" in row:
        return 1 / row["times_floor"]
    return max(row.get("of_matmul", 0.0), row.get("of_bandwidth", 0.0))


def _save(figure: Any, path: Path) -> None:
    # An SVG holds the date if it is not told otherwise, a PNG does not.
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {}, dpi=200)


def draw_sharded(document: dict[str, Any], path: Path) -> None:
    """The sum over devices by its size, and every ratio beside its bar: SVG or PNG.

    document: the content of a results file of `bench sharded`. Errors: `check`'s.
    """
    check(path)
    import_module("matplotlib").use("agg")
    plt = import_module("matplotlib.pyplot")
    sums = [row for row in document["rows"] if row["op"] == "all_reduce"]
    bars = [
        (
            f"{row['op'].removeprefix('sharded_')}, {row['shape']}\nbeside {row['peer']}",
            row["ratio"],
            row.get("bar"),
        )
        for row in document["rows"]
        if "ratio" in row
    ] + [
        (f"step, {row['shape']}, {row['mesh']}", row["speedup"], None)
        for row in document["rows"]
        if row["op"] == "sharded_step" and row["devices"] > 1
    ]
    with plt.rc_context(SETTINGS | {"svg.hashsalt": "sharded"}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, max(3.0, 0.4 * len(bars) + 1)), layout="constrained"
        )
        left.loglog(
            [row["bytes"] for row in sums],
            [row["ours_us"] for row in sums],
            "o-",
            color=COLOURS["ours"],
        )
        for row in sums:
            if "bar_us" in row:
                left.plot(row["bytes"], row["bar_us"], "_", color="black")
        left.set_xlabel("bytes summed")
        left.set_ylabel("µs (dashes: at most)")
        left.set_title("Sum over devices")
        for place, (_, ratio, bar) in enumerate(bars):
            right.barh(place, ratio, height=0.6, color=COLOURS["ours"])
            right.text(ratio, place, f" {ratio:.2f}", va="center", fontsize=6)
            if bar is not None:
                right.plot([bar, bar], [place - 0.4, place + 0.4], color="black")
        right.set_yticks(range(len(bars)), [name for name, *_ in bars])
        right.invert_yaxis()
        right.set_xlabel("one device's time over that of all (line: at least)")
        right.set_title(f"{document['devices']} × {document['device']}")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        _save(figure, path)
        plt.close(figure)
