"""Text for people: tables and sizes."""

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def size(nbytes: int) -> str:
    """``nbytes`` bytes as text in a decimal unit: 1 kB is 1000 bytes."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
