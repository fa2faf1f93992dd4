"""The newest transformers and peft in an environment of their own, and which of our tests hold there: ``make canary``.

``python tests/canary.py FILE ...`` runs these files of tests instead. What it finds is news, not a fault: it prints a
table and ends with 0. It ends with 1 only where it could not look.
"""

import os
import subprocess
import sys
import tempfile
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

WATCHED = ("transformers", "peft", "accelerate")

TESTS = ("test_hf_canary.py", "test_hf_models.py", "test_hf_peft.py", "test_hf_weight.py", "test_adapters_peft.py")
"""Tests that touch names of others, and what these names do."""

FREE = {*WATCHED, "huggingface_hub", "tokenizers", "safetensors", "hf-xet"}
"""Packages that may move with the watched ones; all others, torch first, stay as constraints.txt has them."""


def main() -> int:
    """Install, run each file of tests, print what came out."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="jitmoe-canary-") as name:
        folder = Path(name)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        kept = [line for line in constraints() if line.partition("==")[0] not in FREE]
        (folder / "constraints.txt").write_text("\n".join(kept) + "\n", encoding="utf-8")
        packages = [*WATCHED, "pytest", "pytest-timeout", "hypothesis", "matplotlib", str(CHECKOUT)]
        pip = [python, "-m", "pip", "install", "-q", "--upgrade", "-c", folder / "constraints.txt", *packages]
        if subprocess.run(pip).returncode:
            print("the environment cannot be installed: no verdict", file=sys.stderr)
            return 1
        versions = " ".join(f"{package} {version_of(python, package)}" for package in WATCHED)
        for file in sys.argv[1:] or TESTS:
            rows.append((file, versions, *run_tests(python, file, folder)))
    print(f"\n{'tests':26} {'packages':58} {'passed':>6} {'failed':>6} {'skipped':>7}")
    for file, versions, passed, failed, skipped in rows:
        print(f"{file:26} {versions:58} {passed:6} {failed:6} {skipped:7}")
    return 0


def constraints() -> list[str]:
    """Lines of constraints.txt that pin something."""
    lines = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "==" in line and not line.startswith("#")]


def version_of(python: Path, package: str) -> str:
    """The version that is installed there."""
    question = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return subprocess.run([python, "-c", question], capture_output=True, text=True, check=True).stdout.strip()


def run_tests(python: Path, file: str, folder: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of one file; a file that cannot be loaded is one failure."""
    report = folder / f"{file}.xml"
    command = [python, "-m", "pytest", "-q", "-m", "not slow", f"--junit-xml={report}", CHECKOUT / "tests" / file]
    subprocess.run(command, cwd=CHECKOUT, env={**os.environ, "PYTHONPATH": ""}, timeout=1800)
    if not report.exists():
        return 0, 1, 0
    suite = next(iter(ElementTree.parse(report).getroot().iter("testsuite")))
    total, failed, errors, skipped = (int(suite.get(n, 0)) for n in ("tests", "failures", "errors", "skipped"))
    return total - failed - errors - skipped, failed + errors, skipped


if __name__ == "__main__":
    sys.exit(main())
