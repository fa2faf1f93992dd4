"""Builds sdist and wheel, installs the wheel into an empty environment and tries it there: ``make dist``.

Everything happens in a temporary folder; only ``dist/`` of the checkout is written.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent

NEEDED = ("jitmoe/templates/instance.cpp.in", "jitmoe/templates/gemm/interface.hpp", "jitmoe/py.typed")
"""Files that a wheel without them would only miss at the first call."""

TRIAL = CHECKOUT / "tests" / "installed.py"


def main() -> None:
    """Build, look into the wheel, install, try; the exit status is that of the first step that fails."""
    with tempfile.TemporaryDirectory(prefix="jitmoe-dist-") as name:
        folder = Path(name)
        shutil.rmtree(CHECKOUT / "dist", ignore_errors=True)
        builder = make_environment(folder / "builder")
        run(builder, "-m", "pip", "install", "-q", "build")
        # The wheel is built from the sdist, so the sdist has all that a wheel needs.
        run(builder, "-m", "build", "--outdir", str(CHECKOUT / "dist"), str(CHECKOUT))
        (wheel,) = (CHECKOUT / "dist").glob("*.whl")
        look_into(wheel)
        user = make_environment(folder / "user")
        run(user, "-m", "pip", "install", "-q", "-c", str(CHECKOUT / "constraints.txt"), f"{wheel}[hf]")
        shutil.copy(TRIAL, folder / "trial.py")
        # Kernels in a cache of its own; no PYTHONPATH leads back to the checkout.
        settings = {"JITMOE_CACHE_DIR": str(folder / "kernels"), "PYTHONPATH": "", "PYTHONSAFEPATH": "1"}
        run(user, "-m", "jitmoe", "doctor", folder=folder, settings=settings)
        run(user, "trial.py", str(CHECKOUT), folder=folder, settings=settings)
        run(user, "-m", "jitmoe", "cache", "export", "kernels.zip", folder=folder, settings=settings)
        without = settings | {"JITMOE_CACHE_DIR": str(folder / "other"), "PATH": "/nowhere"}
        run(user, "-m", "jitmoe", "cache", "import", "kernels.zip", folder=folder, settings=without)
        run(user, "trial.py", str(CHECKOUT), folder=folder, settings=without)
    print(f"{wheel.name} works in an empty environment, and with imported kernels without a compiler")


def make_environment(folder: Path) -> Path:
    """Python of a new, empty environment."""
    venv.create(folder, with_pip=True)
    return folder / "bin" / "python"


def look_into(wheel: Path) -> None:
    """Hold the wheel to its name and to the files that it must have."""
    if not wheel.name.endswith("-py3-none-any.whl"):
        sys.exit(f"{wheel.name} is not for every Python 3 and platform")
    missing = set(NEEDED) - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        sys.exit(f"{wheel.name} lacks {', '.join(sorted(missing))}")


def run(python: Path, *arguments: str, folder: Path | None = None, settings: dict[str, str] | None = None) -> None:
    """Run Python with ``arguments``; end with its status if it fails."""
    print("+", *arguments, flush=True)
    done = subprocess.run([python, *arguments], cwd=folder, env={**os.environ, **(settings or {})})
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {' '.join(arguments)}")


if __name__ == "__main__":
    main()
