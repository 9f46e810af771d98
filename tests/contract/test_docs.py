"""The documentation against the repository: links lead somewhere, commands exist as written, the reference is current."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
from typer._click.exceptions import MissingParameter  # typer shows its parser's other errors only
from typer.main import get_command
from typer.testing import CliRunner

from cli.main import app
from infra_cdk.sources import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
IMAGES = {file for file in (ROOT / "docs" / "images").iterdir() if file.is_file()}
GROUP = get_command(app)
COMMANDS: dict[str, Any] = vars(GROUP)["commands"]  # typer's types hide them
OPTIONS = {option for one in [GROUP, *COMMANDS.values()] for found in one.params for option in found.opts} | {"--help"}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CDK_COMMANDS = {"bootstrap", "deploy", "destroy", "diff", "list", "synth"}
CDK_OPTIONS = {"--all", "-c", "--context", "--require-approval", "--cloudformation-execution-policies", "--exclusively"}
CONTEXT = {"stage", "stages", "model_configs"}  # what a person passes; the rest is the laptop's
# What prints no facts, or nothing else.
WITHOUT_JSON = {"demo": "--report writes what it measured", "down": "stops what runs", "config-schema": "prints JSON alone"}


def prose(text: str) -> str:
    """Without code, in which a bracket is no link."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def links(page: Path) -> set[str]:
    text = prose(TEXTS[page])
    found = {target for target, _ in re.findall(r"\]\(([^)\s]+)(\s+\"[^\"]*\")?\)", text)}
    return found | set(re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE))


def anchors(page: Path) -> set[str]:
    """What a forge makes of the headings."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).strip().replace(" ", "-") for heading in headings)
    return set(plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"(https?|mailto):", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert ROOT in target.parents, f"{link} leads out of the repository"
        if anchor:
            assert anchor in anchors(target), link


def test_every_image_is_shown_somewhere() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert {image.name for image in IMAGES - shown} == set()


def test_every_page_is_reached_from_the_readme() -> None:
    reached, ahead = set(), [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        near = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        ahead += [found for found in near & set(PAGES) if found not in reached]
    assert {page.name for page in PAGES} - {page.name for page in reached} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    tops = "|".join(sorted(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir() and path.name != ".git"))
    for name in re.findall(rf"`((?:{tops})/[\w./-]+\.\w+)`", TEXTS[page]):
        placeholder = {"NAME", "TYPE", "STEP"} & set(re.split(r"[/._]", name))
        assert placeholder or (ROOT / name).exists(), name


@dataclass(frozen=True)
class Written:
    """A command as a page has it. `whole`: on a line of its own, so that it can be copied; else a mention of it."""

    page: str
    text: str
    whole: bool

    def __str__(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def words(self) -> list[str]:
        """Without what documentation adds: `[--option]` may be left out, `…` stands for a value, or for more."""
        words = shlex.split(re.sub(r"[\[\]]", " ", self.text), comments=True)
        options = [before.startswith("--") for before in ["", *words]]
        words = ["x" if word == "…" and option else word for word, option in zip(words, options, strict=False)]
        return ["1" if word == "N" else word for word in words if word != "…"]


def written() -> Iterator[Written]:
    starts = r"(?:uv run )?(?:labelloop|cdk|npx aws-cdk@\S+|python -m benchmarks\.\w+|pytest)|make"
    for page, text in TEXTS.items():
        name = str(page.relative_to(ROOT))
        if page.name == "cli.md":  # generated; each command's example is tried below
            continue
        body = re.sub(r" *\\\n\s*", " ", text)
        for indented in re.findall(rf"^(?: {{4,}}|\$ )((?:{starts})(?: .*)?)$", body, re.MULTILINE):
            yield Written(name, re.split(r" {2,}", indented)[0], True)
        for block in re.findall(r"^```(?:sh|bash|console|shell)?\n(.*?)^```", body, re.MULTILINE | re.DOTALL):
            for line in re.findall(rf"^(?:\$ )?((?:{starts})(?: .*)?)$", block, re.MULTILINE):
                yield Written(name, re.split(r" {2,}", line)[0], True)
        for inline in re.findall(rf"`((?:{starts})(?: [^`]*)?)`", body):
            yield Written(name, inline.replace("\n", " "), False)


COMMANDS_WRITTEN = sorted(set(written()), key=str)


def test_commands_are_found_at_all() -> None:
    pages = {one.page for one in COMMANDS_WRITTEN if one.whole}
    assert {"README.md", "docs/adding-a-model.md", "docs/benchmarks.md", "docs/operations.md"} <= pages


@pytest.mark.parametrize("one", COMMANDS_WRITTEN, ids=str)
def test_a_command_can_be_given_as_it_is_written(one: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    match one.words:
        case ["uv", "run", *rest] | [*rest]:
            pass
    match rest:
        case ["labelloop", *words]:
            labelloop_parses(words, whole=one.whole)
        case ["make", *words]:
            targets = [word for word in words if "=" not in word]
            assert set(targets) <= TARGETS
            for word in words:
                if targets == ["demo"] and word.startswith("ARGS="):
                    labelloop_parses(["demo", *shlex.split(word.removeprefix("ARGS="))], whole=True)
        case ["npx" | "cdk" as program, *words]:
            cdk_parses(words[1:] if program == "npx" else words)
        case ["python", "-m", module, *words]:
            assert importlib.util.find_spec(module), module
            benchmark_parses(module, words, monkeypatch)
        case ["pytest", *words]:
            for word in words:
                assert not word.startswith("tests/") or (ROOT / word).exists()
        case _:
            raise AssertionError(rest)


def labelloop_parses(words: list[str], *, whole: bool) -> None:
    """Through the command line's own parser, up to where the command would run. A mention may leave out what is required."""
    if not words or words[0].startswith("-"):
        assert {word for word in words if word.startswith("-")} <= OPTIONS
        return
    name, *rest = words
    assert name in COMMANDS
    try:
        COMMANDS[name].make_context(name, rest)
    except MissingParameter:
        assert not whole
    except typer.Exit:
        assert "--help" in rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_line_for_the_cdk_names_its_stage(page: Path) -> None:
    """Else it is about `dev`: `bootstrap`, too, which would prepare another region than what is deployed next."""
    lines = re.findall(r"npx aws-cdk@\S+ \w.*", TEXTS[page])
    assert [line for line in lines if "-c stage=" not in line] == []


def cdk_parses(words: list[str]) -> None:
    """The CDK's own parser lies on npm. Its commands and options that this project names, and the context that the app reads."""
    command, *rest = words or ["list"]
    assert command in CDK_COMMANDS
    for before, word in zip(["", *rest], rest, strict=False):
        if before in ("-c", "--context"):
            assert word.partition("=")[0] in CONTEXT
        elif word.startswith("-"):
            assert word in CDK_OPTIONS


def benchmark_parses(module: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the benchmark's own parser, up to where it would start to measure."""

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def only_parse(parser: argparse.ArgumentParser, *given: Any, **more: Any) -> Any:
        parse(parser, *given, **more)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Parsed):
        importlib.import_module(module).main()


def test_the_reference_of_commands_is_current() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / ".ci" / "cli_reference.py")
    assert spec
    assert spec.loader
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    assert reference.FILE.read_text(encoding="utf-8") == reference.reference(), "run `make docs`"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_ends_with_an_example_that_can_be_given_and_its_exit_codes(name: str) -> None:
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    (example,) = re.findall(r"Example: (labelloop .*)", shown.output)
    words = shlex.split(example)
    assert words[1] == name
    labelloop_parses(words[1:], whole=True)
    assert "Exit codes: 0 done, 2 " in shown.output
    assert ("--json" in shown.output) is (name not in WITHOUT_JSON)


def test_the_readme_has_every_command() -> None:
    table = set(re.findall(r"`labelloop ([a-z-]+)", TEXTS[ROOT / "README.md"]))
    assert table >= set(COMMANDS)
