"""Imports go one way, and ``stsr --help`` loads nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stsr

PACKAGE = Path(stsr.__file__).parent
VERBS = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__", "errors"}
ALLOWED = {
    "cli": {"cli", "analysis", "data", "methods", "errors", *VERBS},
    "verbs": {"methods", "analysis", "data", "diffusion", "errors", *VERBS},
    "methods": {"methods", "diffusion", "nn", "data.batch", "errors"},
    "analysis": {"analysis", "data", "errors"},
    "data": {"data", "errors"},
    "diffusion": {"diffusion"},
    "nn": {"nn"},
    "errors": set(),
}
HEAVY = (
    "torch",
    "scanpy",
    "spatialdata",
    "squidpy",
    "anndata",
    "pandas",
    "scipy",
    "numpy",
    "zarr",
    "matplotlib",
)


def _imported(path: Path) -> set[str]:
    """Modules of stsr that a file imports, anywhere in it, without the leading ``stsr.``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in whole if _is_module(name)} or {node.module}
    return {name.removeprefix("stsr.") for name in found if name.startswith("stsr.")}


def _is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("stsr.") and (place.with_suffix(".py").is_file() or place.is_dir())


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    if len(parts) > 1:
        return parts[0]
    return "verbs" if path.stem in VERBS else path.stem


def _files() -> list[Path]:
    entrances = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return sorted(set(PACKAGE.rglob("*.py")) - entrances)


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    allowed = ALLOWED[_room(path)]
    for module in _imported(path):
        parts = module.split(".")
        known = {".".join(parts[: number + 1]) for number in range(len(parts))}
        assert known & allowed, f"{path.relative_to(PACKAGE)} must not import stsr.{module}"


def test_only_cli_has_typer_and_rich_and_analysis_and_data_have_no_torch():
    for path in _files():
        tops = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                tops |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                tops.add(node.module.split(".")[0])
        room = _room(path)
        if room != "cli":
            assert not tops & {"typer", "rich", "click"}, path
        if room == "analysis" or (room == "data" and path.name not in ("batch.py", "dataset.py")):
            assert "torch" not in tops, path


def _loaded_by(code: str) -> set[str]:
    script = (
        f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in run.stderr.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import stsr; dir(stsr)",
        "from stsr.cli.app import app; app(['--help'])",
        "from stsr.cli.app import app; app(['--version'])",
        "from stsr.cli.app import app; app(['superres', '--help'])",
    ],
)
def test_help_loads_nothing_heavy(code):
    loaded = _loaded_by(code)
    assert "stsr" in loaded
    assert not loaded & set(HEAVY)


def test_verbs_are_found_when_first_used():
    for verb in stsr.__all__:
        assert getattr(stsr, verb) is not None
    assert callable(stsr.prepare)
    with pytest.raises(AttributeError, match="no attribute 'frobnicate'"):
        _ = stsr.frobnicate
