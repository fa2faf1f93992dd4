"""Finds what is broken in a built site, without a browser: python docs/links.py out/site."""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""Attributes whose addresses a browser loads by itself."""

NOT_LOADED = {"canonical", "prev", "next", "edit"}
"""Relations of <link> that name a page and load nothing."""


class Page(HTMLParser):
    """Addresses that a page names, and the anchors in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what the tag names."""
        found = dict(attrs)
        self.anchors |= {name for name in (found.get("id"), found.get("name")) if name}
        if tag == "a" and found.get("href"):
            self.links.add(str(found["href"]))
        elif found.get(LOADED.get(tag, "")) and found.get("rel") not in NOT_LOADED:
            self.loaded.add(str(found[LOADED[tag]]))


def broken(site: Path) -> list[str]:
    """What is wrong in the pages below ``site``: a line for each link or resource."""
    pages = {path: Page(path) for path in sorted(site.rglob("*.html")) if path.name != "404.html"}
    faults = []
    for path, page in pages.items():
        for address in sorted(page.links | page.loaded):
            fault = _fault(path, address, address in page.loaded, pages)
            if fault is not None:
                faults.append(f"{path.relative_to(site)}: {address} {fault}")
    return faults


def _fault(path: Path, address: str, loaded: bool, pages: dict[Path, Page]) -> str | None:
    parts = urlsplit(address)
    if parts.scheme in ("data", "mailto"):
        return None
    if parts.scheme or parts.netloc:
        return "is loaded from another host" if loaded else None
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    target = target / "index.html" if target.is_dir() else target
    if not target.is_file():
        return "does not exist"
    if parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "has no such anchor"
    return None


def main() -> int:
    """Print what is broken; 1 if anything is, or if there are no pages."""
    site = Path(sys.argv[1]).resolve()
    faults = broken(site)
    print("\n".join(faults) or f"no broken link in {site}")
    return int(bool(faults) or not any(site.rglob("*.html")))


if __name__ == "__main__":
    sys.exit(main())
