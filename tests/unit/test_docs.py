"""The README and the pages in docs/: their links lead somewhere, and their commands are understood."""

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

import doccls.__main__
import doccls.train
import launcher.parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
DRAWN_BY_DEMO = "demo/configs/demo.yaml"
PARSERS = {
    ("doccls",): doccls.__main__.build_parser,
    ("doccls", "train"): doccls.train.build_parser,
    ("doccls-launch",): launcher.parser.build_parser,
    ("python", "-m", "doccls"): doccls.__main__.build_parser,
    ("python", "-m", "doccls.train"): doccls.train.build_parser,
    ("python", "-m", "launcher"): launcher.parser.build_parser,
    (".venv/bin/doccls",): doccls.__main__.build_parser,
}

name_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def split_fences(page: Path) -> tuple[str, list[str]]:
    """Return the page's prose and the contents of its `bash` and `bash template` blocks."""
    prose, blocks, fence = [], [], None
    for line in page.read_text().splitlines():
        if line.lstrip().startswith("```"):
            fence = line.strip().removeprefix("```") if fence is None else None
            if fence is not None and fence.split()[:1] == ["bash"]:
                blocks.append("")
        elif fence is None:
            prose.append(line)
        elif fence.split()[:1] == ["bash"]:
            blocks[-1] += line + "\n"
    assert fence is None, f"{page}: a code block is not closed"
    return "\n".join(prose), blocks


def list_commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command, without its comment, its environment and `accelerate launch`."""
    for block in split_fences(page)[1]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.replace("[", " ").replace("]", " "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words[:2] == ["accelerate", "launch"] and "-m" in words:
                words = ["python", *words[words.index("-m") :]]
            if words:
                yield words


def find_parser(words: list[str]) -> tuple[ArgumentParser, list[str]] | None:
    """Return the parser of the command and the words for it; None for other programs."""
    for count in (3, 2, 1):
        if (build := PARSERS.get(tuple(words[:count]))) is not None:
            return build(), words[count:]
    return None


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@name_page
def test_lines_are_wrapped(page: Path) -> None:
    prose, _ = split_fences(page)
    long = [line for line in prose.splitlines() if len(line) > 120 and "http" not in line]
    assert not long, f"{page.name}: {len(long)} lines over 120 characters, such as {long[0]!r}"


@name_page
def test_links_lead_somewhere(page: Path) -> None:
    prose, _ = split_fences(page)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", split_fences(file)[0], re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}"


def test_every_page_is_reachable_from_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name}" not in index]
    assert missing == ["README.md"]
    assert "(docs/README.md" in (ROOT / "README.md").read_text()


@name_page
def test_commands_are_understood(page: Path) -> None:
    for words in list_commands(page):
        found = find_parser([word for word in words if word != "..."])
        if found is None:
            continue
        parser, rest = found
        try:
            arguments = parser.parse_args(rest)
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)}")
        config = getattr(arguments, "config", None)
        if config is not None and not str(config).isupper() and str(config) != DRAWN_BY_DEMO:
            assert (ROOT / config).is_file(), f"{page.name}: {shlex.join(words)}: no such config"


def test_scripts_and_configs_of_the_readme_exist() -> None:
    for words in list_commands(ROOT / "README.md"):
        for word in words:
            if "/" in word and word.endswith((".sh", ".yaml")) and word != DRAWN_BY_DEMO:
                assert (ROOT / word).is_file(), shlex.join(words)


def test_commands_of_the_readme_are_complete() -> None:
    """The first words of its commands: nothing is left for the reader to fill in."""
    commands = list(list_commands(ROOT / "README.md"))
    assert [words[0] for words in commands] == [
        "make",
        "source",
        "python",
        "doccls-launch",
        "python",
        "sbatch",
        "python",
    ]
    assert not [words for words in commands if {"...", "RUN", "CONFIG"} & set(words)]
