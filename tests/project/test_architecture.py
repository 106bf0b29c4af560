"""The architecture page against the code: its rooms, its arrows and its files."""

import re
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

from docs import room_graph

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
ROOMS = {path.parent.name for path in (ROOT / "geomcache").glob("*/__init__.py")}
LARGEST_FOLDER = 19


def imports() -> Iterator[tuple[str, str]]:
    """(importer, imported) rooms of every import in the package; a file on top is its own name."""
    graph = grimp.build_graph("geomcache", exclude_type_checking_imports=True)
    for module in graph.modules - {"geomcache", "geomcache.__main__"}:
        for imported in graph.find_modules_directly_imported_by(module):
            rooms = module.split(".")[1], imported.split(".")[1]
            if rooms[0] != rooms[1]:
                yield rooms


def test_the_arrows_are_the_imports_between_rooms() -> None:
    between_rooms = {arrow for arrow in imports() if set(arrow) <= ROOMS}
    assert len(between_rooms) > 15
    drawn = room_graph.arrows(PAGE)
    assert (between_rooms - drawn, drawn - between_rooms) == (set(), set())  # (not drawn, drawn and not imported)


def test_the_core_imports_no_room() -> None:
    assert [arrow for arrow in imports() if arrow[0] not in ROOMS and arrow[1] in ROOMS] == []


def test_every_room_is_described_and_has_a_layer() -> None:
    described = set(re.findall(r"^\| `(\w+)` \|", PAGE.partition("## Rooms")[2], re.MULTILINE))
    in_layers = {room for layer in room_graph.layers() for room in layer}
    assert described == ROOMS
    assert in_layers >= ROOMS
    for path in (ROOT / "geomcache").glob("*.py"):
        if not path.name.startswith("__"):
            assert path.stem in in_layers, path.name


@pytest.mark.parametrize("room", ["", *sorted(ROOMS)])
def test_no_folder_is_crowded(room: str) -> None:
    modules = [path for path in (ROOT / "geomcache" / room).glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= LARGEST_FOLDER


def test_the_files_that_the_page_names_exist() -> None:
    table = PAGE.partition("## Find the code")[2].partition("## Rooms")[0]
    for folder, name in re.findall(r"`(?:(geomcache/[\w/]*))?([\w]+\.py)?`", table):
        if folder or name:
            matches = [path for path in (ROOT / "geomcache").rglob("*") if str(path).endswith(f"{folder}{name}")]
            assert matches or (ROOT / folder).is_dir(), folder + name


def test_the_drawing_has_every_room_and_arrow() -> None:
    drawing = room_graph.svg(PAGE)
    for room in ROOMS:
        assert f">{room}</text>" in drawing
    (block,) = room_graph.MERMAID.findall(PAGE)
    without_arrows = room_graph.svg(PAGE.replace(block, "graph TD\n"))
    assert drawing.count('id="patch_') - without_arrows.count('id="patch_') == len(room_graph.arrows(PAGE))
