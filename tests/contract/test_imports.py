"""Which part may import which, read from the source: what a Lambda loads stays small, and the library knows nobody."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.examples import REPOSITORY

LIBRARY = REPOSITORY / "layers" / "labelloop" / "python" / "labelloop"
FUNCTIONS = {file.parent.name: file for file in sorted(REPOSITORY.glob("functions/*/handler.py"))}
PARTS = ("functions", "training_jobs", "infra_cdk", "cli", "local", "model_configs", "benchmarks", "tests")
HEAVY = {"torch", "torchvision", "mlflow", "sagemaker", "pandas", "label_studio_sdk", "sklearn", "scipy", "matplotlib", "onnx"}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "manager", "processor", "base", "misc"}


def sources(*folders: str | Path) -> list[Path]:
    return sorted(file for folder in folders for file in (REPOSITORY / folder).rglob("*.py") if "__pycache__" not in file.parts)


@cache
def imports(file: Path, *, loading: bool = False) -> list[tuple[str, bool]]:
    """Dotted names that a file imports, each with whether it is only for the type checker; `loading`: not inside functions."""
    package = file.relative_to(LIBRARY.parent).parent.parts if file.is_relative_to(LIBRARY) else ()

    def visit(node: ast.AST, typing_only: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() if loading:
                return
            case ast.Import(names=names):
                yield from ((alias.name, typing_only) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                start = ".".join([*package[: len(package) - level + 1], module or ""]).strip(".") if level else str(module)
                yield start, typing_only
                yield from ((f"{start}.{alias.name}", typing_only) for alias in names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING"), body=body, orelse=orelse):
                for statement in body:
                    yield from visit(statement, True)
                for statement in orelse:
                    yield from visit(statement, typing_only)
                return
        for child in ast.iter_child_nodes(node):
            yield from visit(child, typing_only)

    return list(visit(ast.parse(file.read_text()), False))


def roots(file: Path, *, loading: bool = False) -> set[str]:
    """Top-level packages that a file imports when it runs, or already when it is loaded."""
    return {name.partition(".")[0] for name, typing_only in imports(file, loading=loading) if not typing_only}


def module_file(name: str) -> Path | None:
    """The file of a module of the library, or None."""
    if name.partition(".")[0] != "labelloop":
        return None
    place = LIBRARY.parent.joinpath(*name.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


def reachable(file: Path) -> set[Path]:
    """A file and all of the library that it imports, wherever in the code."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        current = waiting.pop()
        if current in found:
            continue
        found.add(current)
        waiting += [place for name, typing_only in imports(current) if not typing_only and (place := module_file(name))]
    return found


def test_there_is_something_to_check() -> None:
    assert {"ingest", "authorize", "predict", "predict_part", "retrain", "promote", "refresh", "prelabel"} <= FUNCTIONS.keys()
    assert LIBRARY / "predict.py" in reachable(FUNCTIONS["predict"])
    assert LIBRARY / "inference.py" in reachable(FUNCTIONS["predict"]), "imports inside functions count"
    assert "onnxruntime" in roots(LIBRARY / "inference.py")


@pytest.mark.parametrize("file", sources(LIBRARY), ids=lambda file: str(file.relative_to(LIBRARY)))
def test_the_library_imports_none_of_its_users(file: Path) -> None:
    assert not roots(file) & set(PARTS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_imports_another_part(function: str) -> None:
    for file in sources(FUNCTIONS[function].parent):
        assert not roots(file) & (set(PARTS) | {"handler"}), file
        assert not [name for name, _ in imports(file) if name.startswith(".")]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_reaches_what_is_heavy(function: str) -> None:
    heavy = {
        str(file.relative_to(REPOSITORY)): found for file in reachable(FUNCTIONS[function]) if (found := roots(file) & HEAVY)
    }
    assert heavy == {}


@pytest.mark.parametrize("function", sorted(FUNCTIONS.keys() - {"predict", "predict_part", "prelabel"}))
def test_only_who_predicts_reaches_the_runtime_of_models(function: str) -> None:
    """The others have no layer with it. Reading a model's outputs, which problem types do inside functions, is theirs."""
    assert not any("onnxruntime" in roots(file) for file in reachable(FUNCTIONS[function]))
    assert not any("numpy" in roots(file, loading=True) for file in reachable(FUNCTIONS[function]))


@pytest.mark.parametrize(
    "file", sources(LIBRARY, "functions", "training_jobs", "model_configs"), ids=lambda file: str(file.relative_to(REPOSITORY))
)
def test_only_settings_reads_the_environment(file: Path) -> None:
    if file != LIBRARY / "settings.py":
        assert environment_readers(ast.parse(file.read_text())) == []


def environment_readers(tree: ast.AST) -> list[int]:
    """Lines that read the environment; setting a default for another library reads nothing."""
    setters = {
        node.func.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("setdefault", "update")
    }
    readers = {"environ", "environb", "getenv", "getenvb"}
    lines: list[int] = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=attr, lineno=line) if attr in readers and node not in setters:
                lines.append(line)
            case ast.ImportFrom(module="os", names=names, lineno=line) if {alias.name for alias in names} & readers:
                lines.append(line)
    return lines


def test_settings_does_read_it() -> None:
    """So that the test above can fail."""
    assert environment_readers(ast.parse((LIBRARY / "settings.py").read_text()))
    assert environment_readers(
        ast.parse("import os\nfrom os import getenv\nos.environ['A']\nos.environ.setdefault('A', 'b')")
    ) == [2, 3]


@pytest.mark.parametrize(
    "file",
    sources(LIBRARY, "functions"),
    ids=lambda file: str(file.relative_to(REPOSITORY)),
)
def test_every_client_of_aws_has_limits_of_ours(file: Path) -> None:
    """boto3's own are a minute for each of five attempts: longer than a function may run."""
    clients = [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("boto3.client", "boto3.resource", "untyped.client")
    ]
    assert all("config" in {keyword.arg for keyword in client.keywords} for client in clients)


@pytest.mark.parametrize("part", ["functions", "training_jobs", "infra_cdk", "cli", "local"])
def test_the_parts_stand_side_by_side(part: str) -> None:
    """Only the command line drives others: the laptop, a stage's settings, the networks that it checks and scores."""
    allowed = {"local", "infra_cdk", "training_jobs"} if part == "cli" else set()
    for file in sources(part):
        own = part if part != "functions" else ""
        assert not roots(file) & (set(PARTS) - {own, "model_configs"} - allowed), file


def test_no_module_has_a_name_that_says_nothing() -> None:
    parts = [part for part in PARTS if (REPOSITORY / part).is_dir()]
    nameless = [file for file in sources(LIBRARY, *parts) if FORBIDDEN_NAMES & {file.stem, *file.relative_to(REPOSITORY).parts}]
    assert nameless == []
