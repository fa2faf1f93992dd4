"""The picture of the README: ``python docs/picture.py`` makes docs/speed-memory.svg of figures in docs/benchmarks.md.

Speed is the time of a peer over ours, the row of W2 and W1 forward+backward on avx512_bf16; memory is the peak of
loading a checkpoint over its size.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PICTURE = DOCS / "speed-memory.svg"

PEERS = ("torch bf16 loop", "grouped_mm bf16", "float32, best")
"""Columns of the table of figures: peers that compute LoRA too."""

TASKS = {"W1 forward+backward": "48 tokens", "W2 forward+backward": "1024 tokens"}

LOADING = {
    "transformers' `from_pretrained`": "transformers",
    "`jitmoe.hf.from_pretrained`": "jitmoe",
    "the same": "mapped",
}
"""How the row of a way to load begins, and what the picture calls it."""


def read_figures(text: str) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times over ours of each peer, in the order of the tasks; and peak over model for each way to load.

    Raises:
        ValueError: docs/benchmarks.md no longer has one of the tables.
    """
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    head = next((row for row in rows if set(PEERS) <= set(row)), None)
    times = {row[0]: row for row in rows if head and len(row) == len(head) and row[0] in TASKS}
    loads = {name: row[1] for row in rows for start, name in LOADING.items() if row[0].startswith(start)}
    if head is None or times.keys() != TASKS.keys() or loads.keys() != set(LOADING.values()):
        raise ValueError("docs/benchmarks.md has no table with these figures")
    speed = {peer: [float(times[task][head.index(peer)]) for task in TASKS] for peer in PEERS}
    return speed, {name: float(re.findall(r"[\d.]+", cell)[-1]) for name, cell in loads.items()}


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "jitmoe", "font.size": 10, "axes.spines.top": False, "svg.fonttype": "none"}
    )
    from matplotlib import pyplot

    speed, loading = read_figures((DOCS / "benchmarks.md").read_text(encoding="utf-8"))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.6, 2.7), width_ratios=(3, 2), layout="constrained")
    names = ("torch, loop\nover experts", "torch\ngrouped_mm", "torch\nfloat32")
    for offset, (task, label) in enumerate(TASKS.items()):
        values = [times[list(TASKS).index(task)] for times in speed.values()]
        places = [at + 0.38 * (offset - 0.5) for at in range(len(values))]
        bars = left.bar(places, values, 0.36, label=label, color=("#7fc4bb", "#00897b")[offset])
        left.bar_label(bars, fmt="%.1f×")
    left.axhline(1, color="black", linewidth=1)
    left.set(xticks=range(len(names)), xticklabels=names, title="time of LoRA forward + backward over jitmoe's")
    left.legend(frameon=False)
    bars = right.bar(list(loading), list(loading.values()), 0.5, color=["#b0bec5", "#00897b", "#7fc4bb"])
    right.bar_label(bars, fmt="%.2f×")
    right.set(title="peak memory of loading over the model")
    for axes in (left, right):
        axes.spines[["right", "left"]].set_visible(False)
        axes.set_yticks([])
        axes.margins(y=0.15)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
