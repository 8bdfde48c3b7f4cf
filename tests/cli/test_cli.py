"""The command line: what goes to stdout and stderr, exit codes, signals, and the commands on a simulated tissue."""

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import stsr
from stsr.cli import console, options, progress
from stsr.cli.app import app, main
from stsr.cli.info import describe
from stsr.errors import StsrError, UsageError
from stsr.genes import listed_genes


def stsr_command(*arguments, code=0):
    """Run a command in this process; returns (stdout, stderr)."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def folders(xenium_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    (place / "xenium").symlink_to(xenium_folder)
    return place


@pytest.fixture(scope="module")
def store(visium_section, folders):
    return shutil.copytree(visium_section, folders / "sample.zarr")


# -------------------------------------------------------------------------------------------------- the frame


def test_version_is_bare():
    assert stsr_command("--version") == (stsr.__version__ + "\n", "")


def test_help_names_every_command():
    out, _ = stsr_command("--help")
    for command in ("prepare", "train", "superres", "info", "demo"):
        assert command in out
        assert "--debug" in stsr_command(command, "--help")[0]


def test_wrong_usage_ends_with_2():
    _, err = stsr_command("superres", "a.zarr", "--scael", "5", code=2)
    assert "--scael" in err
    stsr_command("nonsense", code=2)


@pytest.mark.parametrize(("error", "code"), [(StsrError("no; do this"), 1), (UsageError("no; do this"), 2)])
def test_a_users_error_is_one_sentence(capsys, error, code):
    with pytest.raises(typer.Exit) as stopped, console.session():
        raise error
    assert stopped.value.exit_code == code
    assert capsys.readouterr() == ("", "error: no; do this\n")


def test_debug_shows_the_traceback(capsys):
    with pytest.raises(typer.Exit), console.session(debug=True):
        raise StsrError("no; do this")
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("error: no; do this\n")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [(MemoryError(), 1, "error: out of memory; "), (BrokenPipeError(), 141, "")],
)
def test_memory_that_runs_out_and_a_reader_that_closes_the_pipe(capsys, error, code, told):
    with pytest.raises(typer.Exit) as stopped, console.session():
        raise error
    assert stopped.value.exit_code == code
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == bool(told)


def test_the_console_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["stsr", "--version"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert (stopped.value.code, capsys.readouterr().out) == (0, stsr.__version__ + "\n")
    assert "Usage: stsr" in "".join(CliRunner().invoke(app, []).output)


def test_every_command_has_the_shared_options():
    for name, command in get_command(app).commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert {"--json", "--threads", "--quiet", "--verbose", "--debug"} <= options, name


def test_our_own_error_is_one_line_that_tells_what_to_do(capsys):
    with pytest.raises(typer.Exit) as stopped, console.session():
        raise ZeroDivisionError("first\nsecond")
    assert stopped.value.exit_code == 1
    err = capsys.readouterr().err
    assert (
        err.startswith("internal error: ZeroDivisionError: first;")
        and "--debug" in err
        and err.count("\n") == 1
    )


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 143), ("SIGINT", 130)])
def test_signals_unwind_and_end_with_their_code(name, code):
    # background jobs of a shell ignore Ctrl-C
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGTERM)
    tidied = []
    with pytest.raises(typer.Exit) as stopped, console.session():
        try:
            try:
                signal.raise_signal(getattr(signal, name))
                pytest.fail("the signal was ignored")
            except Exception:
                pytest.fail("a signal was taken for an error")
        finally:
            tidied.append(True)
    signal.signal(signal.SIGINT, interrupt)
    assert stopped.value.exit_code == code and tidied
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupted_run_is_no_error(capsys):
    from stsr.signals import Interrupted

    with pytest.raises(typer.Exit) as stopped, console.session():
        raise Interrupted(signal.SIGTERM, "interrupted; run it again")
    assert stopped.value.exit_code == 143
    assert capsys.readouterr().err == "interrupted; run it again\n"


def test_libraries_keep_quiet_and_off_stdout(capsys):
    def chatter():
        print("chatter")
        warnings.warn("old", FutureWarning, stacklevel=1)
        logging.getLogger("some.library").warning("noise")

    with console.session() as out:
        chatter()
        out.emit("result")
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert "old" not in captured.err and "noise" not in captured.err
    assert logging.root.manager.disable == logging.NOTSET


def test_nobody_reading_stdout_is_quiet(store):
    script = f"{sys.executable} -m stsr info {store} --json | true; echo ${{PIPESTATUS[0]}}"
    run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert run.stdout.strip() in ("0", "141")  # 0 where the pipe took everything before it was closed


def test_threads_reach_the_libraries(monkeypatch):
    for variable in console._THREAD_VARIABLES:
        monkeypatch.setenv(variable, "1")  # so that it is restored
    monkeypatch.setitem(
        sys.modules, "torch", type("Torch", (), {"set_num_threads": staticmethod(told := [].append)})
    )
    console.limit_threads(3)
    assert os.environ["OMP_NUM_THREADS"] == "3" and told.__self__ == [3]


# --------------------------------------------------------------------------------------------------- progress


class _Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_progress_is_a_line_now_and_then_with_the_time_left(capsys, clock):
    with console.session() as out:
        for second in range(41):
            clock.now = 100.0 + second
            out.progress(second, 100, f"tiles, loss {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "tiles, loss 10: 10%, 2 min left"
    assert len(lines) == 4


def test_a_stage_that_goes_on_counts_time_from_where_it_went_on(capsys, clock):
    with console.session() as out:
        out.progress(0.8, 1, "training")
        clock.now += 20
        out.progress(0.9, 1, "training")
    assert capsys.readouterr().err == "training: 90%, 20 s left\n"


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_bar_for_long_work(monkeypatch, clock):
    screen = _Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with console.session() as out:
        out.progress(0.1, 1, "tiles")
        early = screen.getvalue()
        clock.now += 5
        out.progress(0.5, 1, "tiles")
        out.say("a message")
    assert early == ""
    assert "tiles" in screen.getvalue() and "50%" in screen.getvalue()
    assert screen.getvalue().endswith("a message\n")


def test_durations():
    shown = [progress.duration(seconds) for seconds in (0, 89, 100, 90 * 60)]
    assert shown == ["1 s", "89 s", "2 min", "1 h 30 min"]


def test_a_table_aligns_numbers_to_the_right(capsys):
    with console.session() as out:
        out.table(["type", "bins"], [["B_cell", "7"], ["T_cell", "1,234"]], "a title")
    captured = capsys.readouterr()
    assert "│     7 │" in captured.err and "a title" in captured.err and captured.out == ""
    with console.session(quiet=True) as out:
        out.table(["type"], [["B_cell"]])
        out.warn("look")
    assert capsys.readouterr().err == "warning: look\n"


def test_results_are_text_or_json(capsys):
    for as_json, expected in ((False, "map\n"), (True, '{\n  "figure": "f.png"\n}\n')):
        with console.session(as_json=as_json) as out:
            out.finish("map", {"figure": Path("f.png")})
        assert capsys.readouterr().out == expected


def test_short_work_and_quiet_work_show_nothing(capsys, clock):
    with console.session() as out:
        out.progress(0.0, 1, "short")
        clock.now += 4
        out.progress(1.0, 1, "short")
    with console.session(quiet=True) as out:
        out.say("hello")
        out.progress(0.0, 1, "long")
        clock.now += 400
        out.progress(0.5, 1, "long")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------------- options


def test_genes_from_words_lists_and_files(tmp_path):
    file = tmp_path / "genes.txt"
    file.write_text("GATA3  # a comment\n\nLUM, POSTN\n")
    assert listed_genes(["ERBB2,LUM", f"@{file}", "KRT8"]) == ["ERBB2", "LUM", "GATA3", "POSTN", "KRT8"]
    assert listed_genes(None) is None
    assert listed_genes(["GATA3", "all"]) == ["all"]
    with pytest.raises(UsageError, match=r"nowhere\.txt"):
        listed_genes(["@nowhere.txt"])
    with pytest.raises(UsageError, match="names no gene"):
        listed_genes([","])


def test_regions():
    assert options.region_um("0,10,200.5,300") == (0, 10, 200.5, 300)
    for wrong in ("0,0,1", "a,b,c,d", "5,0,5,9"):
        with pytest.raises(UsageError, match="region"):
            options.region_um(wrong)


# --------------------------------------------------------------------------------------------------- commands


def test_prepare_prints_the_path_and_tells_people_the_rest(folders):
    output = folders / "xenium.zarr"
    out, err = stsr_command("prepare", folders / "xenium", "--output", output)
    assert out == f"{output}\n"
    assert "extent    500 x 400 um" in err and "4 genes" in err
    _, err = stsr_command("prepare", folders / "xenium", "--output", output, code=2)
    assert err.count("\n") == 1 and "--overwrite" in err
    out, err = stsr_command(
        "prepare", folders / "xenium", "--output", output, "--overwrite", "-q", "--genes", "ERBB2"
    )
    assert err == "" and stsr.open_section(output).hr.genes == ["ERBB2"]
    out, _ = stsr_command("prepare", folders / "xenium", "--output", output, "--overwrite", "--json")
    assert json.loads(out)["hr"]["genes"] == 4


def test_prepare_of_nothing(tmp_path):
    _, err = stsr_command("prepare", tmp_path / "nowhere", "-o", tmp_path / "a.zarr", code=1)
    assert err.count("\n") == 1 and "nowhere" in err
    assert list(tmp_path.iterdir()) == []


def test_info_for_people_and_machines(store):
    out, _ = stsr_command("info", store)
    assert "55 um" in out and "4 genes" in out
    found = json.loads(stsr_command("info", store, "--json")[0])
    assert found["spots"]["genes"] == 4
    found |= {
        "image": None,
        "cells": {"number": 12, "genes": 0},
        "provenance": {
            "he": {"refined": True, "refined_by_um": 3.14159, "fine_correlation": [0.1, 0.6]},
            "superres_x10": {"command": "superres", "method": "bicubic", "model": None},
        },
    }
    lines = describe(found)
    assert "image     none" in lines and "cells     12, no counts" in lines
    assert any(line.startswith("aligned   H&E moved by 3.14 um") for line in lines)
    assert lines[-1] == "superres_x10: method bicubic"
    assert stsr_command("info", store / "nowhere", code=1)[0] == ""


def test_superres_prints_the_element_draws_and_refuses_to_replace(store, tmp_path):
    figure = tmp_path / "maps.png"
    arguments = ["superres", store, "--method", "bicubic", "--genes", "GATA3,LUM", "--scale", "5"]
    arguments += ["--consistency", "exact"]
    out, err = stsr_command(*arguments, "--figure", figure)
    assert out == "superres_x5\n"
    assert "measured counts" in err
    assert figure.stat().st_size > 10_000
    shown = stsr.open_section(store).map("superres_x5")
    assert shown.genes == ["GATA3", "LUM"] and shown.grid.bin_um == 20
    _, err = stsr_command(*arguments, code=2)
    assert "--overwrite" in err and err.count("\n") == 1
    made = json.loads(stsr_command(*arguments, "--overwrite", "--json")[0])
    assert made["element"] == "superres_x5" and made["consistency_error"] < 1e-3


def test_superres_refuses_with_a_sentence(store, tmp_path):
    common = ["superres", store, "--method", "bicubic"]
    _, err = stsr_command(*common, "--genes", "GATA4", code=2)
    assert "GATA3" in err
    _, err = stsr_command(*common, "--scale", "7", code=2)
    assert "10" in err
    _, err = stsr_command(*common, "--figure", tmp_path / "maps.doc", code=2)
    assert ".png" in err
    _, err = stsr_command(*common, "--figure-genes", "LUM", code=2)
    assert "--figure" in err
    _, err = stsr_command(*common, "--region", "1,2,3", code=2)
    assert "x0,y0,x1,y1" in err


def test_train_dry_run_prints_the_configuration(folders):
    section = stsr.prepare(folders / "xenium", folders / "train.zarr")
    arguments = [
        "train",
        section,
        "-o",
        folders / "m.safetensors",
        "--method",
        "unet",
        "--val",
        0,
        "--dry-run",
    ]
    out, _ = stsr_command(*arguments, "--steps", 7, "--set", "train_tile_lr=3", "--set", "batch=1")
    found = json.loads(out)
    assert found["config"]["train"]["steps"] == 7 and found["method"] == "unet"
    _, err = stsr_command(*arguments, "--set", "stepz=7", code=2)
    assert "steps" in err
    assert not (folders / "m.safetensors").exists()


def test_demo_keeps_off_other_peoples_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    _, err = stsr_command("demo", "--output", tmp_path, code=2)
    assert "--output" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_demos_table_has_a_row_for_each_method_and_the_ceiling():
    import pandas as pd

    from stsr.cli.demo import comparison
    from stsr.verbs.demo import summarise

    scores = pd.DataFrame(
        {
            "section": "xenium",
            "method": ["stsr", "stsr", "bilinear", "bilinear"] * 2,
            "gene": ["A", "B"] * 4,
            "bin_um": [10.0] * 4 + [20.0] * 4,
            "pcc": [0.5, 0.7, 0.2, 0.4, 0.8, 0.8, 0.5, 0.5],
            "rmse": 1.0,
            "noise_ceiling": 0.9,
        }
    )
    columns, rows = comparison(summarise(scores))
    assert columns == ["section", "method", "10 um", "20 um", "RMSE"]
    assert rows[0] == ["xenium", "stsr", "0.600", "0.800", "1.000"]
    assert rows[1][:3] == ["xenium", "bilinear", "0.300"]
    assert rows[2] == ["xenium", "(highest possible)", "0.900", "0.900", ""]
