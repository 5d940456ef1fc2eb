"""Files beside docs/ as pages of the site, so that a link between them works here and where the repository is read.

A document keeps its path: `benchmarks/vbp/README.md` links to `../../docs/data.md`, and `docs/data.md` back to
`../benchmarks/vbp/README.md`. In the site the folder docs/ is the root, so those links are written anew.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
SHOWN = (
    "benchmarks/vbp/README.md",
    "benchmarks/results/*.md",
    "examples/*.py",
    "examples/*.sbatch",
    "examples/*.ipynb",
)
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files of the repository that pages link to."""
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to where the site has their targets."""
    place = page.file.src_uri
    folder = posixpath.dirname(place if place.startswith("benchmarks/") else f"docs/{place}")

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        shown = target.removeprefix("docs/")
        if files.get_file_from_path(shown) is None:
            return link[1]  # for the strict build to complain about
        return posixpath.relpath(shown, posixpath.dirname(place) or ".")

    return _LINK.sub(moved, markdown)
