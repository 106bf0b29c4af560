"""Extend mkdocs: texts made from the code, files of the repository as pages, links that hold.

Pages are written so that their links work in the repository. Here a link to a file that is not a page of the site leads
to a copy of it. `mkdocs build --strict` then fails at every link that leads nowhere.
"""

import posixpath
import re
import sys
from pathlib import PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from reference import MARKERS, REPOSITORY
from room_graph import MERMAID, svg

sys.dont_write_bytecode = True  # mkdocs would publish a __pycache__ next to this file

INCLUDED = {
    "benchmarks.md": "benchmarks/RESULTS.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "recipes.md": "pipelines/README.md",
    "security.md": "SECURITY.md",
}
"""Pages that are files of the repository outside docs/."""
COPIES = "repository"
GRAPH_PAGE, GRAPH = "architecture.md", "images/rooms.svg"

_MARKER = re.compile(r"<!-- generated: ([\w ]+) -->")
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the included pages, the drawing of the rooms, and copies of what pages link to."""
    for uri, source in INCLUDED.items():
        files.append(File.generated(config, uri, content=(REPOSITORY / source).read_text(encoding="utf-8")))
    graph_page = files.get_file_from_path(GRAPH_PAGE)
    assert graph_page is not None
    files.append(File.generated(config, GRAPH, content=svg(graph_page.content_string)))
    linked = {target for page in files.documentation_pages() for target in _outside(page.content_string, page.src_uri)}
    for target in sorted(linked):
        files.append(File.generated(config, f"{COPIES}/{target}", abs_src_path=str(REPOSITORY / target)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001 - by name
    """Fill in the markers, put the drawing in the place of the mermaid block, and turn links."""
    if page.file.src_uri == GRAPH_PAGE:
        markdown = MERMAID.sub(
            f"![The rooms in their layers; an arrow means that one imports the other]({GRAPH})", markdown
        )
    return _MARKER.sub(_generated, _LINK.sub(lambda link: _turned(link, page.file.src_uri), markdown))


def _generated(marker: re.Match[str]) -> str:
    if marker[1] not in MARKERS:
        raise PluginError(f"{marker[0]}: expected one of {', '.join(MARKERS)}, got {marker[1]!r}")
    text: str = MARKERS[marker[1]]()
    return text


def _turned(link: re.Match[str], uri: str) -> str:
    target, anchor = _in_repository(link[1], uri), link[2] or ""
    for page, source in INCLUDED.items():
        if target == source:
            return page + anchor
    if target.startswith("docs/"):
        return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(uri) or ".") + anchor
    return f"{COPIES}/{target}" if (REPOSITORY / target).is_file() else link[0]


def _outside(markdown: str, uri: str) -> set[str]:
    """Return the files of the repository that a page links to and that are neither pages nor in docs/."""
    targets = {_in_repository(link[1], uri) for link in _LINK.finditer(markdown)}
    own = {target for target in targets if target.startswith("docs/") or target in INCLUDED.values()}
    return {target for target in targets - own if (REPOSITORY / target).is_file()}


def _in_repository(link: str, uri: str) -> str:
    """Resolve a page's link to a path from the repository's root."""
    source = PurePosixPath(INCLUDED.get(uri, f"docs/{uri}"))
    return posixpath.normpath(str(source.parent / link))
