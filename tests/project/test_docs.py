"""Test the documents: texts made from the code are complete, quoted messages exist, links lead somewhere."""

import ast
import dataclasses
import html.parser
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import typing
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

from docs import reference
from geomcache.cli import main as cli
from geomcache.da3.catalog import MODELS
from geomcache.geometry import DatasetSpec, GeometrySpec

ROOT = Path(__file__).parents[2]
PAGES = sorted(page for place in (".", "docs", "pipelines", "benchmarks") for page in (ROOT / place).glob("*.md"))
UPSTREAM = {"LeRobot": "lerobot", "LIBERO": "libero", "MuJoCo": "mujoco"}


def sections(markdown: str) -> dict[str, str]:
    """Return the text below each third-level heading."""
    parts = re.split(r"^### (.+)\n", markdown, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_and_option_is_in_the_reference() -> None:
    group = typing.cast("typing.Any", typer.main.get_command(cli.app))
    found = sections(reference.command_reference())
    assert set(found) == {f"geomcache {name}" for name in group.commands}
    for name, command in group.commands.items():
        text = found[f"geomcache {name}"]
        assert command.help in text
        for param in command.params:
            if param.hidden:
                continue
            if param.param_type_name == "argument":
                assert f"| `{(param.metavar or param.name).upper()}` | {param.help} |" in text
                continue
            (row,) = (line for line in text.splitlines() if line.startswith(f"| `{param.opts[0]}`"))
            assert row.replace("`", "").endswith(f"| {param.help} |".replace("`", ""))
            for spelling in (*param.opts, *param.secondary_opts):
                assert f"`{spelling}`" in row
        for line in command.epilog.splitlines():
            if line.startswith("  "):
                assert line.removeprefix("  ").replace("\\[", "[") in text.splitlines()
        assert "[bold]" not in text


def test_every_wait_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    rows = page.partition("## What is waited for")[2].partition("\n## ")[0].splitlines()
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = [re.findall(r"`(test_\w+)`", row) for row in rows if row.startswith("| ") and "**" not in row][2:]
    assert len(named) > 20
    assert {name for names in named for name in names} <= defined
    assert sum(not names for names in named) == 2  # "the same", and a line of huggingface_hub


def test_the_reference_has_types_and_defaults() -> None:
    found = sections(reference.command_reference())
    extract = found["geomcache extract"]
    assert "| `--process-res` | integer | `504` |" in extract
    assert "| `--views` | `joint`, `independent` | `joint` |" in extract
    assert "| `--model` | text | required |" in extract
    assert "| `--num-workers` | integer | the spare cores, up to 8 |" in extract
    assert "| `--batch-size` | `N`, `auto` | 16 on a GPU, 4 on a CPU |" in extract
    assert "| `--dry-run` | flag | off |" in extract
    assert "| `--rgb`, `--no-rgb` | flag | on |" in found["geomcache view"]
    assert "| `--image` | path, more than once | required |" in found["geomcache probe"]
    assert "geomcache train [OPTIONS] [OPTIONS OF LEROBOT]" in found["geomcache train"]


def test_options_of_the_policy_are_those_of_its_configuration() -> None:
    from lerobot.policies.pi05.configuration_pi05 import PI05Config

    from geomcache.policy.configuration_pi05_geometry import PI05GeometryConfig

    inherited = {field.name for field in dataclasses.fields(PI05Config)}
    table = reference.policy_options().splitlines()[2:]
    own = [field for field in dataclasses.fields(PI05GeometryConfig) if field.name not in inherited]
    assert len(table) == len(own)
    for row, field in zip(table, own, strict=True):
        default = str(field.default).replace("(", "[").replace(")", "]").replace(" ", "")
        default = default.lower() if isinstance(field.default, bool) else default
        assert row.startswith(f"| `--policy.{field.name}` |")
        assert f"| {reference.NO_DEFAULT if field.default is None else f'`{default}`'} |" in row
        assert len(row.split(" | ")[-1]) > len("meaning |")


def test_every_model_is_in_the_table_of_licences() -> None:
    rows = reference.model_licences().splitlines()[2:]
    assert len(rows) == len(MODELS)
    for row, model in zip(rows, MODELS.values(), strict=True):
        assert row.startswith(f"| `{model.name}` | {model.license} |")
    assert "| `DA3-LARGE-1.1` | CC BY-NC 4.0 | yes |  |" in rows


def test_the_format_page_names_every_field_of_spec_and_dataset() -> None:
    page = (ROOT / "docs" / "cache-format.md").read_text(encoding="utf-8")
    for member, part in ((GeometrySpec, "spec"), (DatasetSpec, "dataset")):
        rows = page.partition(f"| member of `{part}` |")[2].partition("\n\n")[0]
        named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", rows, re.MULTILINE)))
        # the page's history has `images_sha256`, of schema version 1
        assert named == [field.name for field in dataclasses.fields(member) if field.name != "images_sha256"]


def shown_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each `geomcache COMMAND ...` in a page's blocks of commands, from COMMAND on."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.search(r"(?:^|-m )geomcache (\w+.*)", line.partition("  #")[0])
            if match:
                yield match[1].split()


def test_options_of_the_commands_on_the_pages_exist() -> None:
    group = typing.cast("typing.Any", typer.main.get_command(cli.app))
    seen = set()
    for page in PAGES:
        for name, *words in shown_commands(page):
            command = group.commands[name]
            seen.add(name)
            known = {spelling for param in command.params for spelling in (*param.opts, *param.secondary_opts)}
            options = {word.partition("=")[0] for word in words if word.startswith("-")}
            if not command.context_settings.get("ignore_unknown_options"):  # otherwise the others are LeRobot's
                assert options <= known, f"{page.name}: geomcache {name} {' '.join(words)}"
    assert seen == set(group.commands)


def quoted_messages() -> Iterator[tuple[str, str]]:
    """Yield package and message of each row of the troubleshooting page that begins with a message."""
    for line in (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").splitlines():
        match = re.match(r"\| (?:(\w+): )?`([^`]+)`", line)
        if match and match[2] not in ("xformers", "HuggingFaceVLA/libero", "ModuleNotFoundError: addict"):
            yield UPSTREAM[match[1]] if match[1] else "geomcache", match[2]


@pytest.mark.parametrize("package", ["geomcache", *UPSTREAM.values()])
def test_messages_on_the_page_of_troubles_are_in_the_code(package: str) -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    messages = [message for name, message in quoted_messages() if name == package]
    assert messages
    missing = set(messages)
    for file in Path(next(iter(spec.submodule_search_locations))).rglob("*.py"):
        source = file.read_text(encoding="utf-8", errors="replace")
        # Parse only files that may have one: a message can be split into literals of several lines.
        if any(message.split()[0] in source for message in missing):
            literals = "\n".join(_literals(source))
            missing -= {message for message in missing if message in literals}
    assert not missing


def _literals(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_of_the_repository_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    generated = {
        "benchmarks.md": "benchmarks/RESULTS.md",
        "changelog.md": "CHANGELOG.md",
        "contributing.md": "CONTRIBUTING.md",
        "recipes.md": "pipelines/README.md",
        "security.md": "SECURITY.md",
    }
    for target in re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text):
        path = ROOT / generated[target] if page.parent.name == "docs" and target in generated else page.parent / target
        assert path.exists(), f"{page.name}: {target}"


def test_figures_of_the_readme_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8").replace(",", "")
    tables = (ROOT / "README.md").read_text(encoding="utf-8").split("| from benchmarks/RESULTS.md")[1:]
    assert len(tables) == 2
    for table in tables:
        cells = re.findall(r"^\|[^|]+\|([^|]+)\|", table.partition("\n\n")[0], re.MULTILINE)[1:]
        figures = [figure for cell in cells for figure in re.findall(r"\d+(?:\.\d+)?", cell.replace(",", ""))]
        assert len(figures) > 5
        for figure in figures:  # rounded in one of them
            assert re.search(rf"(?<![\d.]){re.escape(figure)}\d*(?!\d)", results) or _rounds_to(figure, results), figure


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    released = re.findall(
        r"^## \[(\d[^\]]*)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert project["version"] == released[0][0]
    plugin = ROOT / "packages" / "lerobot_policy_pi05_geometry" / "pyproject.toml"
    plugin_project = tomllib.loads(plugin.read_text(encoding="utf-8"))["project"]
    assert plugin_project["version"] == released[0][0]
    assert plugin_project["dependencies"] == [f"geomcache=={released[0][0]}"]
    assert f"\nversion: {released[0][0]}\n" in citation
    assert f'\ndate-released: "{released[0][1]}"\n' in citation


def test_continuous_integration_calls_targets_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"^        target: \[(.+)\]$", workflow, re.MULTILINE)
    called = set(re.findall(r"^make ([\w-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE))
    assert called == {"test", "lint", "demo"}
    assert called <= set(matrix.split(", ")) <= targets


def test_contributing_names_targets_rooms_and_tests_that_exist() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?<=`make )[a-z0-9-]+(?=`)", page)) <= targets
    rooms = {f"geomcache/{path.parent.name}/" for path in ROOT.glob("geomcache/*/__init__.py")}
    assert rooms <= set(re.findall(r"`(geomcache/\w+/)`", page))
    for path in re.findall(r"\btests/[\w/.]*\w", page):
        assert (ROOT / path).exists(), path


def _rounds_to(figure: str, text: str) -> bool:
    digits = len(figure.partition(".")[2])
    return any(f"{float(number):.{digits}f}" == figure for number in re.findall(r"\d+\.\d+", text))


class _Html(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.append(value)
            elif value and name == "id":
                self.anchors.add(value)


def test_the_site_is_built_without_a_warning_and_its_links_hold(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: `make setup` does it")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages: dict[Path, _Html] = {}
    for path in tmp_path.rglob("*.html"):
        pages[path] = _Html()
        pages[path].feed(path.read_text(encoding="utf-8"))
    assert len(pages) > 12
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or (path.name == "404.html" and link.startswith("/")):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
    assert "generated:" not in (tmp_path / "commands.html").read_text(encoding="utf-8")
    assert "--process-res" in (tmp_path / "commands.html").read_text(encoding="utf-8")
    reference_page = (tmp_path / "api-reference.html").read_text(encoding="utf-8")
    for name in ("GeometryStore", "Geometry", "GeometrySpec", "DA3Encoder", "GeometryDataset", "ExtractOptions"):
        assert re.search(rf'id="geomcache\.[\w.]*{name}"', reference_page), name
    assert "images/rooms.svg" in (tmp_path / "architecture.html").read_text(encoding="utf-8")
    assert "mermaid" not in (tmp_path / "architecture.html").read_text(encoding="utf-8")
