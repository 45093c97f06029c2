"""Four methods at one memory budget on the embedded model: a table, and a picture of it.

    python scripts/demo.py

Two tasks of `run.py`, shortened to fit a few minutes on two CPU cores: passkeys in filler text, and
summaries of pages of Python's manual. Table and picture are made from the run records alone, so a
second call, which has nothing left to run, shows the same in seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from rich import box
from rich.console import Console
from rich.table import Table

from buzz.errors import ConfigError
from evals.report.methods import style_of
from evals.results.reading import read_summary
from evals.results.records import RunFailed
from evals.run.runner import run

ROOT = Path(__file__).resolve().parents[1]
FIGURE = ROOT / "results/figures/demo.png"
BUDGET = 0.25
METHODS = {name: style_of(name) for name in ("full", "streaming_llm", "h2o", "buzz")}
# task -> its overrides, what it is, what its score is
TASKS = {
    "needle": (
        ["task.lengths=[1024]", "task.repeats=2"],
        "passkeys",
        "share found in 1,024 tokens",
    ),
    "pydoc": (
        ["task.samples=6", "task.shortest=700", "task.longest=1200"],
        "page summaries",
        "ROUGE-2 precision on the page",
    ),
}

Summary = dict[str, Any]


def run_all() -> dict[tuple[str, str], Summary]:
    """Runs what is missing and reads every (task, method)'s summary from its run folder."""
    summaries = {}
    with initialize_config_dir(str(ROOT / "configs"), version_base=None):
        for task, (overrides, *_) in TASKS.items():
            for method in METHODS:
                setting = [f"task={task}", f"method={method}", f"budget={BUDGET}", *overrides]
                cfg = compose("config", [*setting, f"output={ROOT / 'results/runs'}"])
                summaries[task, method] = summary = read_summary(run(cfg))
                if not summary["n"]:
                    raise RunFailed(f"{task} with {method}: every sample ran out of memory")
    return summaries


def table(summaries: dict[tuple[str, str], Summary]) -> Table:
    """All runs in one table, each compared with the full cache on its task."""
    title = f"SmolLM2-135M, KV budget {BUDGET:.0%} of the prompt"
    result = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_style="bold")
    result.caption = "score: " + "; ".join(
        f"{name}, {measure}" for _, name, measure in TASKS.values()
    )
    result.add_column("", no_wrap=True)
    headings = (
        "score",
        "KV MB\nmean",
        "\npeak",
        "KV\n/full",
        "TTFT\ns",
        "decode\ntok/s",
        "\n/full",
    )
    for heading in (*headings, "n"):
        result.add_column(heading, justify="right", no_wrap=True)
    for task, (_, name, _) in TASKS.items():
        full = summaries[task, "full"]
        result.add_section()
        result.add_row(f"[bold]{name}[/]")
        for method, (label, *_) in METHODS.items():
            row = summaries[task, method]
            result.add_row(
                label,
                f"{row['score']:.2f}",
                f"{row['kv_nbytes_mean'] / 1e6:.1f}",
                f"{row['kv_nbytes_peak'] / 1e6:.1f}",
                f"{row['kv_nbytes_mean'] / full['kv_nbytes_mean']:.2f}",
                f"{row['ttft_s']:.2f}",
                f"{row['decode_tokens_per_s']:.1f}",
                f"{row['decode_tokens_per_s'] / full['decode_tokens_per_s']:.2f}",
                str(row["n"]),
            )
    return result


def draw(summaries: dict[tuple[str, str], Summary], path: Path) -> None:
    """Score against KV memory, one panel per task: mean (marker) to peak (thin line).

    No error bars: so few samples give none worth drawing, so n is in the title.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, len(TASKS), figsize=(7.2, 3.1), layout="constrained")
    for axis, (task, (_, name, measure)) in zip(axes, TASKS.items(), strict=True):
        for method, (label, color, marker) in METHODS.items():
            row = summaries[task, method]
            memory = [row["kv_nbytes_mean"] / 1e6, row["kv_nbytes_peak"] / 1e6]
            style = {"color": color, "marker": marker, "ms": 7, "label": label}
            axis.plot(memory, [row["score"]] * 2, lw=1.2, markevery=[0], **style)
        axis.set_title(f"{name} (n = {summaries[task, 'full']['n']})", fontsize=9)
        axis.set_xlabel("KV cache while decoding, mean to peak (MB)")
        axis.set_ylabel(measure)
        axis.set_xlim(left=0)
        axis.set_ylim(-0.03, 1.05)
        axis.grid(alpha=0.25, lw=0.5)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(METHODS), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def main() -> int:
    try:
        summaries = run_all()
    except (ConfigError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    Console().print(table(summaries))
    draw(summaries, FIGURE)
    print(f"picture: {FIGURE.relative_to(ROOT)}   records: results/runs/*/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
