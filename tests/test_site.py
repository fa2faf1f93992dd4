"""The site: code on its pages runs, its tables are whole, and what is broken in it is found."""

import contextlib
import functools
import http.server
import importlib.util
import json
import queue
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest

from jitmoe.cli import main

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "docs"))

import cells  # noqa: E402
import links  # noqa: E402
import picture  # noqa: E402
import tables  # noqa: E402

PAGES = {path.stem: path for path in sorted((ROOT / "docs" / "site").glob("*.md"))}
WITH_CODE = [name for name, path in PAGES.items() if "```python" in path.read_text(encoding="utf-8")]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

CHROMIUM_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

HARNESS = """<!doctype html><body><script>
const pages = PAGES, faults = [];
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = "border: 0; height: 900px; width: " + width + "px";
  const loaded = new Promise(done => frame.onload = done);
  frame.src = page;
  document.body.append(frame);
  await loaded;
  const shown = frame.contentDocument;
  if (!shown.querySelector("h1")) faults.push(page + ": no heading");
  for (const image of shown.images) { image.loading = "eager"; await image.decode().catch(() => 0); }
  for (const image of shown.images) if (!image.naturalWidth) faults.push(page + ": " + image.src);
  const over = shown.documentElement.scrollWidth - width;
  if (over > 0) faults.push(page + ": " + over + " pixels wider than " + width);
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of [1280, 390]) await look(page, width);
  fetch("/found", {method: "POST", body: JSON.stringify({seen: pages.length, faults: faults})});
})();
</script>"""
"""Opens every page at two widths and says what a reader would miss."""


PRINTED = {
    "inside": r"^layer 0, call 0 \(forward\): x of expert \d+ has 1 NaN .*token 3,.*column 17",
    "memory": r"packed_gate",
    "start": r"torch\.Size\(\[8, 176, 8\]\)",
    "transformers": r"rank 8 \w+ active",
    "kernel": r"constexpr jitmoe::Shape shape",
}
"""What the code of a page prints, where that is what the page promises."""

LEFT = {"inside": {"trace.png", "call.pt"}, "memory": {"experts.packed"}, "transformers": {"Qwen3-30B-A3B", "packed"}}
"""Files that it leaves."""


@pytest.mark.parametrize("name", WITH_CODE)
def test_code_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Block after block in one session, as a reader would type them."""
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    if name == "transformers":
        families.eager_model("qwen3_moe", vocab_size=1000).save_pretrained("Qwen3-30B-A3B")  # a tiny one by that name
    session: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGES[name].read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGES[name]), "exec"), session)
    assert re.search(PRINTED.get(name, ""), capsys.readouterr().out, re.MULTILINE)
    assert {path.name for path in tmp_path.iterdir()} == LEFT.get(name, set())
    if name == "inside":
        assert main(["replay", "call.pt"]) == 0
    if name == "layer":
        # B starts at zero, so its gradient is the one that is not.
        assert session["layer"].gate_lora_b.grad.count_nonzero() > 0 and session["x"].grad.count_nonzero() > 0


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(script: Path) -> None:
    """Its own assertions hold, and each cell has prose."""
    parts = cells.split(script.read_text(encoding="utf-8"))
    assert all(part.prose for part in parts) and parts[0].prose.startswith("# ")
    joined = "".join(part.code for part in parts)
    assert "assert " in joined and any(cells.run(parts, script.name))


def test_prose_and_code_are_told_apart() -> None:
    script = "# # Title\n#\n# More.\nx = 1\n\n# Next\nif x:\n    # inside\n    print(x)\n"
    first, second = cells.split(script)
    assert (first.prose, first.code) == ("# Title\n\nMore.", "x = 1")
    assert (second.prose, second.code) == ("Next", "if x:\n    # inside\n    print(x)")
    assert cells.run([first, second], "script") == ["", "1"]


def test_every_error_has_a_cure_of_its_own() -> None:
    errors = tables.error_classes()
    assert all("cure" in vars(error) and len(error.cure) > 20 for error in errors)
    assert len({error.cure for error in errors}) == len(errors)
    assert all(f"## {error.__name__}\n" in tables.errors_page() for error in errors)


def test_tables_have_every_name() -> None:
    support, settings = tables.support_page(), tables.settings_page()
    for name in (*tables.ISAS, *tables.PACKINGS, *tables.FAMILIES, *tables.FORMATS):
        assert f"| `{name}` |" in support
    assert all(f"`{setting.variable}`" in settings for setting in tables.settings.SETTINGS.values())
    for block in re.findall(r"(?:^\|.*\n)+", support + settings, re.MULTILINE):
        assert len({line.count(" | ") for line in block.splitlines()}) == 1, block


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    made = {"settings", "errors", "support", "changelog", "structure", "benchmarks", "findings"}
    made |= {f"tutorial-{script.stem}" for script in TUTORIALS}
    assert set(re.findall(r": ([\w-]+)\.md$", navigation, re.MULTILINE)) == PAGES.keys() | made


def test_the_picture_shows_the_figures_of_the_benchmarks() -> None:
    """After a change of figures: python docs/picture.py."""
    speed, loading = picture.read_figures((ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"))
    shown = re.findall(r">([\d.]+)×<", picture.PICTURE.read_text(encoding="utf-8"))
    times = [f"{values[task]:.1f}" for task in range(len(picture.TASKS)) for values in speed.values()]
    assert shown == times + [f"{value:.2f}" for value in loading.values()]
    assert picture.PICTURE.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="b.html#here">', None),
        ('<a href="https://example.org/x">', None),
        ('<a href="c.html">', "c.html does not exist"),
        ('<a href="b.html#gone">', "has no such anchor"),
        ('<a href="#gone">', "has no such anchor"),
        ('<img src="no.png">', "no.png does not exist"),
        ('<script src="https://example.org/x.js"></script>', "loaded from another host"),
        ('<link rel="stylesheet" href="//example.org/x.css">', "loaded from another host"),
    ],
)
def test_broken_links_are_found(tmp_path: Path, body: str, fault: str | None) -> None:
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h1 id="here">')
    found = links.broken(tmp_path)
    assert len(found) == (fault is not None) and all(fault in line for line in found if fault)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    if importlib.util.find_spec("material") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, "queue.Queue[str]"]]:
    """The folder on a port of this machine, and what pages have sent back."""
    sent: queue.Queue[str] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            sent.put(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", sent
        server.shutdown()


@pytest.mark.slow
def test_the_built_site_has_no_broken_link(site: Path) -> None:
    assert links.broken(site) == []


@pytest.mark.slow
def test_every_page_in_a_browser(site: Path, tmp_path: Path) -> None:
    """Images load, and nothing is wider than the window, on a desk and on a telephone."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium: apt install chromium")
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html") if path.name != "404.html")
    (site / "harness.html").write_text(HARNESS.replace("PAGES", json.dumps(pages)))
    with served(site) as (address, sent):
        command = [CHROMIUM, *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path}", "--window-size=1400,1000"]
        # A port for debuggers keeps it open until we end it.
        command += ["--remote-debugging-port=0", f"{address}/harness.html"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as browser:
            try:
                report = json.loads(sent.get(timeout=150))
            finally:
                browser.terminate()
    assert report["seen"] == len(pages) > 20 and report["faults"] == []
