"""What mkdocs asks for while it builds the site: pages that are made, and comments of templates in pages."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))

import cells  # noqa: E402
import tables  # noqa: E402

INCLUDE = re.compile(r"^<!-- comments of (\S+) -->$", re.MULTILINE)

COPIED = {"structure.md", "benchmarks.md", "findings.md"}

ELSEWHERE = re.compile(r"\[([^\]]*)\]\((?:\.\./)?(?:README|CONTRIBUTING|CHANGELOG|SECURITY)\.md[^)]*\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made, and what of docs/ is shown as it is."""
    made = {
        "settings.md": tables.settings_page(),
        "errors.md": tables.errors_page(),
        "support.md": tables.support_page(),
    }
    made |= {name: _local(ROOT / "docs" / name) for name in sorted(COPIED)}
    made["changelog.md"] = _local(ROOT / "CHANGELOG.md")
    for script in sorted((ROOT / "docs" / "tutorials").glob("*.py")):
        made[f"tutorial-{script.stem}.md"] = cells.page(script.read_text(encoding="utf-8"), script.name)
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted((ROOT / "docs").glob("*.png")):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the comment at the head of a template in the place of ``<!-- comments of FILE -->``."""
    return INCLUDE.sub(lambda found: head_comment(ROOT / "templates" / found[1]), markdown)


def head_comment(path: Path) -> str:
    """The comment that a template begins with, as a block of text with the template's name."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next(at for at, line in enumerate(lines) if not line.startswith("//"))]
    text = "\n".join(re.sub("^// ?", "", line) for line in head)
    return f'```text title="templates/{path.relative_to(ROOT / "templates")}"\n{text}\n```'


def _local(path: Path) -> str:
    """The text of a page without links to files that are not in the site."""
    return ELSEWHERE.sub(r"\1", path.read_text(encoding="utf-8")).replace("](docs/", "](")
