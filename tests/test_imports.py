"""Imports go one way, heavy packages stay in their rooms, and ``stsr --help`` loads none of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stsr

PACKAGE = Path(stsr.__file__).parent

GROUND = {"files", "genes", "errors", "progress", "version"}
"""Modules that import nothing of stsr but each other."""

ALLOWED = {
    "cli": {
        "verbs",
        "methods",
        "checkpoint",
        "platforms",
        "store",
        "figures",
        "metrics",
        "signals",
        "device",
    },
    "verbs": {
        "methods",
        "checkpoint",
        "features",
        "platforms",
        "store",
        "histology",
        "geometry",
        "spots",
        "spread",
        "diffusion",
        "figures",
        "metrics",
        "signals",
        "device",
    },
    "checkpoint": {"methods", "store"},
    "features": {"store", "histology", "geometry", "nn", "signals"},
    "methods": {"diffusion", "nn", "spots", "spread", "geometry"},
    "platforms": {"store", "histology", "geometry"},
    "store": {"histology", "geometry"},
    "histology": {"geometry"},
    "spots": {"geometry"},
    "spread": {"diffusion", "geometry"},
    "figures": {"store", "histology", "geometry"},
    "metrics": {"geometry"},
    "simulate": {"geometry"},
    "geometry": set(),
    "diffusion": set(),
    "nn": set(),
    "signals": set(),
    "device": set(),
    **{module: set() for module in GROUND},
}
"""Room: the rooms it may import from, besides itself and the ground. What is not here is refused."""

VERBS_OF_VERBS = {"demo", "evaluate", "report"}
"""Verbs that run other verbs; `demo` simulates its tissue, too."""

NO_TORCH = {"store", "histology", "geometry", "platforms", "spots", "simulate", "figures", "metrics"} | GROUND
SPATIALDATA = {"store", "platforms"}
TERMINAL = {"typer", "rich", "click"}
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
    """Every module that a file imports, anywhere in it, with its package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in whole if _is_module(name)} or {node.module}
    return found


def _is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return name.startswith("stsr.") and (place.with_suffix(".py").is_file() or place.is_dir())


def _ours(path: Path) -> set[tuple[str, ...]]:
    """Modules of stsr that a file imports, as paths: ("store", "section")."""
    return {tuple(name.split("."))[1:] for name in _imported(path) if name.startswith("stsr.")}


def _place(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def _files() -> list[Path]:
    entrances = {PACKAGE / "__init__.py", PACKAGE / "__main__.py"}
    return sorted(set(PACKAGE.rglob("*.py")) - entrances)


def _id(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", _files(), ids=_id)
def test_imports_go_one_way(path):
    place = _place(path)
    room = place[0]
    allowed = ALLOWED[room] | GROUND | {room}
    if place == ("verbs", "demo"):
        allowed = allowed | {"simulate"}
    for module in _ours(path):
        assert module[0] in allowed, f"{_id(path)} must not import stsr.{'.'.join(module)}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "verbs").rglob("*.py")), ids=_id)
def test_no_verb_imports_a_verb(path):
    verb = _place(path)[1]
    for module in _ours(path):
        if module[0] == "verbs" and verb not in VERBS_OF_VERBS:
            assert module[1] == verb, f"{_id(path)} must not import stsr.{'.'.join(module)}"


@pytest.mark.parametrize("path", _files(), ids=_id)
def test_heavy_packages_stay_in_their_rooms(path):
    room = _place(path)[0]
    tops = {name.partition(".")[0] for name in _imported(path)}
    if room != "cli":
        assert not tops & TERMINAL, "only cli talks to terminals"
    if room in NO_TORCH:
        assert "torch" not in tops
    if room not in SPATIALDATA:
        assert "spatialdata" not in tops


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
