"""What pages and agreeing heads cost a method, from committed samples: two tables and a figure.

A row's label tells its method and what constrained it: `h2o,granularity=page16,heads=layer`.
A page's score is the mean of its tokens' scores, or with `page_score=max` their highest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import pandas as pd
from matplotlib.ticker import FixedLocator, NullLocator

from evals.report.figures import RC, name_ends, named_grey, panels, plt, save
from evals.report.methods import GREY, highlighted, style_of
from evals.report.table import Table
from evals.results.frame import DIFFERENCE, NOTHING, REFERENCE, interval

LABEL = (
    r"^(?P<of>[^,]+)(?:,granularity=page(?P<page>\d+))?(?:,page_score=(?P<score>max))?"
    r"(?:,heads=(?P<heads>layer|all))?$"
)
PASSKEYS = "niah_single_1"  # in the name of a setting whose score counts the passkeys found
FREE = "token, each"
UNITS, HEADS = ("token", "page 16", "page 64"), ("each", "layer", "all")
TITLES = {
    "each": "each head chooses",
    "layer": "heads of a layer agree",
    "all": "all heads agree",
}
TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 3)
CONSTRAINTS = [f"{unit}, {heads}" for unit in UNITS for heads in HEADS]


def constrained(rows: pd.DataFrame) -> pd.DataFrame:
    """Methods' rows with `of`, the method, and `constraint`, one of :data:`CONSTRAINTS`.

    `, max` follows a constraint whose pages count by their highest score. Empty unless some row is
    constrained.
    """
    found = rows[rows.row != REFERENCE]
    parts = found.label.str.extract(LABEL)
    unit = parts.page.map("page {}".format).where(parts.page.notna(), "token")
    by_max = parts.score.map({"max": ", max"}).fillna("")
    name = unit + ", " + parts.heads.fillna("each") + by_max
    found = found.assign(of=parts.of, constraint=name)
    return found[parts.of.notna() & (found.constraint != FREE).any()]


def tables(rows: pd.DataFrame) -> list[Table]:
    """KL under each constraint, KL less the unconstrained method's, and passkeys found."""
    everything, rows = rows[rows.row == REFERENCE], constrained(rows)
    keys = rows.setting.str.contains(PASSKEYS)
    texts = complete(rows[~keys & rows.kl_to_full.notna()])
    found = []
    if not texts.empty:
        kl = by_constraint(texts).sort_values(FREE)
        order = pd.DataFrame([kl.corr("spearman")[FREE]], index=["order (Spearman)"])
        held = texts[texts.constraint == FREE].groupby("of").held.mean()
        told = counted(texts)
        note = (
            "KL(full || method) in nats a token on the full cache's own answer, mean of the data"
            f" sets' means; prompts: {told}; held: entries on average over the budget, with tokens"
            " and heads of their own choice. The last line: rank correlation with the first column,"
            " over the methods that both columns have."
        )
        frame = pd.concat([kl.assign(held=held), order]).rename_axis("method").reset_index()
        found.append(Table("serving", "KL under a server's constraints", frame, note))
        note = (
            "KL under the constraint less KL of the same method where each head keeps entries of"
            f" its own choice, paired by prompt, with its 95% interval; prompts: {told}."
        )
        pairs = {name: FREE for name in CONSTRAINTS[1:]}
        frame = differences(texts, pairs, list(kl.index))
        found.append(Table("serving_cost", "What a constraint adds", frame, note))
        pairs = {f"{name}, max": name for name in CONSTRAINTS}
        pairs = {name: other for name, other in pairs.items() if name in set(texts.constraint)}
        if pairs:
            known = texts[texts.constraint.isin(pairs)]
            note = (
                "KL where a page counts by its highest score less KL where it counts by its mean,"
                f" with its 95% interval; prompts: {counted(known)}."
            )
            frame = differences(texts, pairs, [name for name in kl.index if name in set(known.of)])
            found.append(Table("serving_max", "Pages by their highest score", frame, note))
    for setting, group in complete(rows[keys]).groupby("setting"):
        share = group.pivot_table("score", "of", "constraint").reindex(columns=CONSTRAINTS)
        share.loc[REFERENCE, FREE] = everything[everything.setting == setting].score.mean()
        frame = share.sort_values(FREE, ascending=False).rename_axis("method").reset_index()
        note = f"Passkeys found, in percent, of {group.id.nunique()} prompts."
        name = f"serving_{setting}".replace(" ", "_")
        found.append(Table(name, f"Passkeys under the constraints, {setting}", frame, note))
    return found


def complete(rows: pd.DataFrame) -> pd.DataFrame:
    """The prompts that every row of the data set answered: means are of the same prompts."""
    rows = rows[rows.status == "ok"]
    of = rows.groupby(["setting", "id"]).label.transform("nunique")
    return rows[of == rows.groupby("setting").label.transform("nunique")]


def counted(rows: pd.DataFrame) -> str:
    """How many prompts each data set has."""
    counts = rows.groupby("setting").id.nunique()
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def differences(
    rows: pd.DataFrame, pairs: Mapping[str, str], methods: Sequence[str]
) -> pd.DataFrame:
    """KL under a constraint less KL under another one, prompt by prompt: a column for each pair."""
    lines = []
    for method in methods:
        wide = rows[rows.of == method].pivot_table("kl_to_full", ["setting", "id"], "constraint")
        line: dict[str, Any] = {"method": method}
        for name, other in pairs.items():
            less = NOTHING
            if name in wide and other in wide:
                sets = wide.index.get_level_values(0)
                less = interval(wide[[name, other]], DIFFERENCE, group=sets, guard=False)
            line |= {name: less.value, f"{name} low": less.low, f"{name} high": less.high}
        lines.append(line)
    return pd.DataFrame(lines)


def by_constraint(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean of the data sets' mean KL, [methods, constraints]; blank where a data set lacks it."""
    means = rows.groupby(["of", "constraint", "setting"]).kl_to_full.mean().unstack()
    return means.mean(axis=1, skipna=False).unstack().reindex(columns=CONSTRAINTS)


def draw(rows: pd.DataFrame, out: Path) -> list[Path]:
    """A panel for each kind of agreement between heads; a line per method from tokens to pages."""
    rows = constrained(rows)
    texts = complete(rows[~rows.setting.str.contains(PASSKEYS) & rows.kl_to_full.notna()])
    kl = by_constraint(texts)
    methods = list(kl.index)
    coloured = highlighted(methods)
    with plt.rc_context(RC):
        figure, axes = panels(len(HEADS), 3.6, 4.4)
        for axis, heads in zip(axes, HEADS, strict=True):
            ends = []
            for method, values in kl[[f"{unit}, {heads}" for unit in UNITS]].iterrows():
                label, color, marker = style_of(str(method))
                color, layer = (color, 3) if method in coloured else (GREY, 2)
                axis.plot(range(len(UNITS)), values, color=color, marker=marker, ms=4, zorder=layer)
                known = [i for i, value in enumerate(values) if pd.notna(value)]
                if method in coloured and known:
                    ends.append((known[-1], values.iloc[known[-1]], label, color))
            axis.set(yscale="log", title=TITLES[heads], xlim=(-0.2, len(UNITS) - 0.2))
            axis.set_ylim(0.9 * kl.min(axis=None), 1.1 * kl.max(axis=None))
            axis.yaxis.set_major_locator(FixedLocator(TICKS))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
            axis.set_xticks(range(len(UNITS)), UNITS)
            name_ends(axis, ends)
        axes[0].set_ylabel("KL to the full cache (nats a token)")
        grey = named_grey(methods, coloured)
        figure.suptitle("\n".join(wrap(grey, 130)), y=0.0, va="top", fontsize=8)
        return [save(figure, out / "serving.png", bbox_inches="tight")]
