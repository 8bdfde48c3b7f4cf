"""Documentation agrees with the code: options, links, command lines, Python, settings."""

import ast
import inspect
import json
import re
import sys
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command

import stsr
from stsr.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDE = ROOT / "CONTRIBUTING.md"
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".sh"))
COMMANDS = get_command(app).commands
COMMON = "Options of every command"
SHARED = ("--threads", "--quiet", "--verbose", "--debug", "--json")  # documented once


def name(path):
    return str(path.relative_to(ROOT))


def sections(text):
    """{heading: text below it} of the second level."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code(text, *languages):
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def options(command):
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


CLI = sections((ROOT / "docs/cli.md").read_text(encoding="utf-8"))


def documented(command):
    return next(text for heading, text in CLI.items() if re.match(rf"`stsr {command}\b", heading))


def rows(text):
    """(first cell, second cell) of tables."""
    return [
        tuple(cell.strip() for cell in line.split("|")[1:3]) for line in text.splitlines() if line[:1] == "|"
    ]


def default_shown(parameter, cell):
    """Whether a cell names an option's default; for flags that they are off."""
    if parameter.default is None or parameter.required:
        return bool(cell)
    if isinstance(parameter.default, bool):
        shown = parameter.opts[0] if parameter.default else "off"
        return cell.strip("`") == shown
    number = isinstance(parameter.default, (int, float))
    return cell == (f"`{parameter.default:g}`" if number else f"`{parameter.default}`")


# ------------------------------------------------------------------------------------------------ docs/cli.md


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_with_its_default(command):
    for parameter in COMMANDS[command].params:
        if parameter.param_type_name == "argument":
            heading = next(heading for heading in CLI if re.match(rf"`stsr {command}\b", heading))
            assert parameter.metavar in heading
            continue
        place = CLI[COMMON] if parameter.opts[0] in SHARED else documented(command)
        for option in (*parameter.opts, *parameter.secondary_opts):
            found = [row for row in rows(place) if re.search(rf"(?<![\w-]){option}(?![\w-])", row[0])]
            assert found, f"{option} of {command}"
            assert default_shown(parameter, found[0][1]), f"default of {option} of {command}: {found[0][1]}"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_documented_that_does_not_exist(command):
    known = {*options(COMMANDS[command]), "--help", "-h"}
    for first, _ in rows(documented(command)):
        assert set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", first)) <= known


def test_every_command_has_a_section_and_a_line_in_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in COMMANDS:
        assert documented(command)
        assert f"| `stsr {command}` |" in readme


# ----------------------------------------------------------------------------------------- links and commands


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, GUIDE], ids=name)
def test_relative_links_resolve(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} in {name(page)}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in map(slug, headings), f"{link} in {name(page)}"


def test_readme_leads_to_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in [*PAGES[1:], GUIDE]:
        assert f"]({name(page)})" in readme


def test_the_site_has_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf": {re.escape(page.name)}$", navigation, flags=re.MULTILINE), page.name


def test_the_site_documents_every_public_function():
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for public in set(stsr.__all__) - {"__version__"}:
        assert f"::: {getattr(stsr, public).__module__}.{public}\n" in text
    for module, attribute in re.findall(r"^::: (\S+)\.(\w+)$", text, flags=re.MULTILINE):
        assert getattr(import_module(module), attribute).__doc__


def shell(path):
    """Shell text of a page or an example, without comments, with lines joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        parts = [*code(text, "bash", "sh", "console"), *re.findall(r"`([^`\n]*\bstsr [^`\n]*)`", text)]
        text = "\n".join(parts)
    elif path.suffix == ".py":
        return ""
    text = text.replace("\\\n", " ")
    return "\n".join(re.sub(r"(^|\s)#.*$", "", line) for line in text.splitlines())


@pytest.mark.parametrize("path", [*PAGES, *EXAMPLES], ids=name)
def test_command_lines_name_commands_and_options_that_exist(path):
    for line in re.findall(r"(?<![\w.-])stsr ([^|&;)\n]+)", shell(path)):
        words = line.split()
        if words[0] in ("--version", "--help", "COMMAND"):
            continue
        assert words[0] in COMMANDS, f"stsr {line}"
        known = {*options(COMMANDS[words[0]]), "--help", "-h"}
        asked = {word.partition("=")[0].strip(",") for word in words[1:] if re.match(r"--?[a-z]", word)}
        assert asked <= known, f"stsr {line}"


# ------------------------------------------------------------------------------------------- Python, settings


def calls_of_verbs(source):
    for node in ast.walk(ast.parse(source)):
        function = getattr(node, "func", None)
        if isinstance(function, ast.Attribute) and getattr(function.value, "id", None) == "stsr":
            yield function.attr, node


@pytest.mark.parametrize("path", [*PAGES, *(path for path in EXAMPLES if path.suffix == ".py")], ids=name)
def test_python_uses_verbs_as_they_are(path):
    text = path.read_text(encoding="utf-8")
    for source in code(text, "python") if path.suffix == ".md" else [text]:
        for verb, call in calls_of_verbs(source):
            assert verb in stsr.__all__
            keywords = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(getattr(stsr, verb)).bind(*call.args, **keywords)


def test_settings_in_the_training_page_are_right():
    from stsr.methods import DEFAULT_METHOD, method_class
    from stsr.verbs.train.config import TrainConfig, resolve

    text = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    for block in code(text, "toml"):
        resolve(method_class(DEFAULT_METHOD), tomllib.loads(block), [])
    for line in re.findall(r"--set ([\w.]+=[^\s`]+)", text):
        resolve(method_class(DEFAULT_METHOD), {}, [line])
    for block in code(text, "json"):
        assert all(set(own) <= {"exclude", "validation"} for own in json.loads(block).values())
    shown = {}
    for first, second in rows(sections(text)["Settings"])[2:]:
        keys, values = re.findall(r"`([^`]+)`", first), re.findall(r"`([^`]+)`", second)
        shown |= {
            key: tomllib.loads(f"value = {value}")["value"] for key, value in zip(keys, values, strict=True)
        }
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    assert shown == {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    }


def test_changes_begin_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE).group(1) == stsr.__version__


def test_every_file_named_in_the_architecture_exists():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:src/stsr/|tests/)?[a-z_/]+(?:\.py|/))`", text))
    assert len(named) > 30
    for path in named:
        place = ROOT / path if path.startswith(("src/", "tests/")) else ROOT / "src/stsr" / path
        assert place.exists(), path


# ------------------------------------------------------------------------------------------- CONTRIBUTING.md


def snippet(path, monkeypatch):
    """The module that CONTRIBUTING.md shows for a path."""
    text = GUIDE.read_text(encoding="utf-8")
    source = next(block for block in code(text, "python") if block.startswith(f"# {path}"))
    module = ModuleType(path.removeprefix("src/").removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def test_the_guide_adds_a_method_that_works(monkeypatch):
    import torch

    from stsr.methods.batch import Batch

    shown = snippet("src/stsr/methods/nearest.py", monkeypatch)
    lr = torch.tensor([[[[100.0, 200.0], [0.0, 400.0]]]])
    batch = Batch(
        image=torch.zeros(1, 3, 20, 20, dtype=torch.uint8),
        lr=lr,
        lr_mask=torch.ones(1, 1, 2, 2),
        has_lr=torch.tensor([True]),
        lr_mean=lr.mean((2, 3)),
        genes=torch.ones(1, 1),
        names=("GATA3",),
    )
    bins = shown.Nearest(panel=("GATA3",)).predict(batch, None)
    assert bins.shape == (1, 1, 20, 20)
    assert bins[0, 0, :10, 10:].unique().tolist() == [2.0]
    assert torch.equal(torch.nn.functional.avg_pool2d(bins, 10) * 100, lr)


def test_the_guide_adds_a_platform_that_works(tmp_path, monkeypatch):
    import numpy as np
    import tifffile

    from stsr.errors import StsrError
    from stsr.platforms.source import Options

    shown = snippet("src/stsr/platforms/spots_csv.py", monkeypatch)
    assert not shown.recognises(tmp_path)
    (tmp_path / "spots.csv").write_text("spot,x_um,y_um,GATA3,LUM\na,50,60,3,0\nb,150,60,1,7\n")
    tifffile.imwrite(tmp_path / "he.tif", np.full((200, 400, 3), 200, np.uint8))
    assert shown.recognises(tmp_path)
    with pytest.raises(StsrError, match="--um-per-px"):
        shown.read(tmp_path, Options())
    source = shown.read(tmp_path, Options(um_per_px=0.5, genes=("LUM",)))
    assert source.genes == ["LUM"]
    assert np.asarray(source.spots.counts.X).tolist() == [[0], [7]]
    assert source.spots.centres_um.tolist() == [[50, 60], [150, 60]]
    assert source.image.bounds_um == pytest.approx((0, 0, 200, 100))


def test_the_guide_adds_a_verb_that_works(monkeypatch):
    import typer
    from typer.testing import CliRunner

    verb = snippet("src/stsr/verbs/totals/verb.py", monkeypatch)

    class Shown:
        genes = ("GATA3", "LUM")

        def read(self, genes):
            import numpy as np

            return np.full((1, 2, 2), 1.0 + self.genes.index(genes[0]))

    class Store:
        def map(self, element):
            assert element == "superres_x10"
            return Shown()

    monkeypatch.setattr(verb, "open_section", lambda store: Store())
    monkeypatch.setattr(stsr, "totals", verb.totals, raising=False)
    shown = typer.Typer()
    shown.command()(snippet("src/stsr/cli/totals.py", monkeypatch).totals)
    result = CliRunner().invoke(shown, ["sample.zarr", "--from", "superres_x10", "--json"])
    assert json.loads(result.stdout) == {"GATA3": 4.0, "LUM": 8.0}
