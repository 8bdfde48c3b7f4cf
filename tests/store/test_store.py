"""Elements appear completely or not at all, measured ones are kept, and after a kill at any moment a store opens."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.store import catalogue, consolidated, names, publishing
from stsr.store import writer as map_writer
from stsr.store.writer import MapWriter

spatialdata = pytest.importorskip("spatialdata")

GRID = Grid(100.0, 200.0, 10.0, 40, 30)
GENES = ["A", "B", "C"]
SUPERRES = {"superres_x10": {"command": "superres", "seed": 1}}


def section():
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    he = Image2DModel.parse(
        np.zeros((3, 64, 64), np.uint8),
        dims=("c", "y", "x"),
        transformations={"global": Scale([5, 5], ("x", "y"))},
    )
    return spatialdata.SpatialData(images={"he": he})


def labels(value: int):
    from spatialdata.models import Labels2DModel
    from spatialdata.transformations import Identity

    return Labels2DModel.parse(
        np.full((16, 16), value, np.int32), dims=("y", "x"), transformations={"global": Identity()}
    )


@pytest.fixture(params=["zarr3", "zarr2", "unconsolidated"])
def path(request, tmp_path):
    path = tmp_path / "sample.zarr"
    if request.param == "zarr3":
        publishing.create(path, section(), {"he": {"command": "prepare"}})
        return path
    arguments = publishing.container(2) if request.param == "zarr2" else {"consolidate_metadata": False}
    with catalogue.quiet():
        section().write(path, **arguments)
    frame = {"coordinate_system": "global", "um_per_unit": 1.0}
    consolidated.edit_root(path, tmp_path, lambda root: root.update({names.FRAME_KEY: frame}))
    return path


def opened(path):
    with catalogue.quiet():
        return spatialdata.read_zarr(path)


def write_map(path, value=1.0, overwrite=False, elements=("superres_x10",), provenance=None):
    with MapWriter(path, elements, GENES, GRID, provenance or SUPERRES, overwrite) as writer:
        for number, element in enumerate(elements):
            values = np.full((3, 40, 30), value + number)
            writer.write(element, slice(0, 3), slice(0, 40), slice(0, 30), values)


def value_of(path, element="superres_x10"):
    return float(np.unique(np.asarray(opened(path).images[element].data)).item())


def nothing_beside(path) -> bool:
    return not [child.name for child in path.parent.iterdir() if child.name.startswith(".")]


# ------------------------------------------------------------------------------------------------------- names


def test_names_round_trip():
    assert names.hr_name(10) == "hr_10um" and names.bin_um_of("hr_10um") == 10
    assert names.result_name("superres", 10) == "superres_x10" and names.bin_um_of("superres_x10_sd") == 10
    assert names.bin_um_of(names.result_name("superres", 5)) == 20 and names.bin_um_of("he") is None
    with pytest.raises(UsageError, match="--name"):
        names.check_name("HR_10um")


def test_map_opens_as_an_image_with_genes_and_place(path):
    write_map(path, 2.5, elements=("superres_x10", "superres_x10_sd"))
    image = opened(path).images["superres_x10"]
    assert list(image.coords["c"].values) == GENES and image.dtype == np.float32
    from spatialdata.transformations import get_transformation

    matrix = get_transformation(image).to_affine_matrix(("x", "y"), ("x", "y"))
    assert np.allclose(matrix, GRID.bin_to_um)
    assert value_of(path) == 2.5 and value_of(path, "superres_x10_sd") == 3.5
    assert opened(path).attrs["stsr"]["superres_x10"]["seed"] == 1
    assert nothing_beside(path)


def test_big_map_gets_a_pyramid_of_means(path, monkeypatch):
    monkeypatch.setattr(map_writer, "_PYRAMID_BINS", 16)
    monkeypatch.setattr(map_writer, "CHUNKS", (2, 8, 8))
    values = np.random.default_rng(0).random((3, 40, 31)).astype(np.float32)
    with MapWriter(path, ["superres_x10"], GENES, Grid(0, 0, 10, 40, 31)) as writer:
        for row in range(0, 40, 8):
            rows = slice(row, row + 8)
            writer.write("superres_x10", slice(0, 3), rows, slice(0, 31), values[:, rows])
    tree = opened(path).images["superres_x10"]
    levels = [np.asarray(tree[f"scale{number}"]["image"].data) for number in range(3)]
    assert [level.shape for level in levels] == [(3, 40, 31), (3, 20, 16), (3, 10, 8)]
    assert np.array_equal(levels[0], values)
    assert np.allclose(levels[1][:, :, :15], values[:, :, :30].reshape(3, 20, 2, 15, 2).mean((2, 4)))


def test_newest_map_is_found(path):
    with pytest.raises(StsrError, match="stsr superres"):
        catalogue.Catalogue(path).newest_superres()
    write_map(path)
    write_map(path, elements=["superres_x5"])
    assert catalogue.Catalogue(path).newest_superres() == "superres_x5"
    write_map(path, overwrite=True)
    assert catalogue.Catalogue(path).newest_superres() == "superres_x10"


def test_an_element_beside_a_map_is_published_with_the_first(path):
    made = {**SUPERRES, "support": {"command": "superres", "origin": "derived"}}
    for value, name in ((1, "superres_x10"), (2, "superres_x5")):
        with MapWriter(path, [name], GENES, GRID, made, beside={"support": labels(value)}):
            pass
        assert np.unique(np.asarray(opened(path).labels["support"].data)).tolist() == [1]
    assert set(opened(path).images) == {"he", "superres_x10", "superres_x5"}
    assert catalogue.provenance(path)["support"]["origin"] == "derived" and nothing_beside(path)


def test_unfinished_work_stays_with_the_blocks_that_are_done(path):
    for keep in (True, False):
        with pytest.raises(KeyboardInterrupt), MapWriter(path, ["superres_x10"], GENES, GRID) as writer:
            file = writer.scratch("0.raw")
            file.write_text("half")
            writer.keep = keep
            raise KeyboardInterrupt
        assert file.exists() == keep
    assert nothing_beside(path)


# -------------------------------------------------------------------------------------------------- what stays


def test_existing_output_needs_overwrite(path):
    write_map(path, 1.0)
    with pytest.raises(UsageError, match="--overwrite"):
        write_map(path, 2.0)
    assert value_of(path) == 1.0
    write_map(path, 2.0, overwrite=True)
    assert value_of(path) == 2.0 and nothing_beside(path)


def test_spread_of_a_replaced_map_goes_with_it(path):
    both = {**SUPERRES, "superres_x10_sd": {"command": "superres"}}
    write_map(path, 1.0, elements=("superres_x10", "superres_x10_sd"), provenance=both)
    write_map(path, 2.0, overwrite=True)
    assert set(opened(path).images) == {"he", "superres_x10"}
    assert set(catalogue.provenance(path)) - {"he"} == {"superres_x10"}


@pytest.mark.parametrize("name", ["he", "HE"])
def test_measured_elements_stay(path, name):
    with pytest.raises(StsrError, match="never replaced"):
        publishing.publish(path, {name: labels(1)}, {name: {}}, overwrite=True)
    assert set(opened(path).images) == {"he"} and nothing_beside(path)


def test_elements_of_others_stay(path):
    with catalogue.quiet():
        sdata = opened(path)
        sdata.labels["theirs"] = labels(1)
        sdata.write_element(
            "theirs", sdata_formats=publishing.container(catalogue.zarr_format(path)).get("sdata_formats")
        )
    with pytest.raises(StsrError, match="not a result of stsr"):
        publishing.publish(path, {"theirs": labels(2)}, {}, overwrite=True)
    publishing.publish(path, {"mine": labels(3)}, {"mine": {}})
    assert set(opened(path).labels) == {"mine", "theirs"}


def test_publish_labels_and_tables_as_one_group(path):
    from anndata import AnnData

    table = AnnData(np.ones((2, 3), np.float32))
    publishing.publish(
        path, {"celltype_x10": labels(4), "gec_x10": table}, {"celltype_x10": {"a": np.float32(1)}}
    )
    sdata = opened(path)
    assert set(sdata.labels) == {"celltype_x10"} and set(sdata.tables) == {"gec_x10"}
    assert catalogue.provenance(path)["celltype_x10"]["a"] == 1.0
    assert nothing_beside(path)


# ---------------------------------------------------------------------------------------------------- refusals


def test_no_store(tmp_path):
    with pytest.raises(StsrError, match="stsr prepare"):
        catalogue.require_store(tmp_path / "none.zarr")
    with pytest.raises(StsrError, match="not a SpatialData store"):
        catalogue.require_store(tmp_path)


def test_create_refuses_what_is_there(tmp_path):
    path = tmp_path / "s.zarr"
    publishing.create(path, section(), {"he": {"command": "prepare"}})
    assert opened(path).has_consolidated_metadata()
    with pytest.raises(UsageError, match="--overwrite"):
        publishing.create(path, section(), {})
    publishing.create(
        path, opened(path), {"he": {"again": True}}, overwrite=True
    )  # lazy, from the same place
    assert catalogue.provenance(path)["he"]["again"] and set(opened(path).images) == {"he"}
    (tmp_path / "diary").mkdir()
    with pytest.raises(StsrError, match="not a SpatialData store"):
        publishing.create(tmp_path / "diary", section(), {}, overwrite=True)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["diary", "s.zarr"]


def test_full_disk_leaves_nothing(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StsrError, match="full"), MapWriter(path, ["superres_x10"], GENES, GRID) as writer:
        monkeypatch.setattr(type(writer._arrays["superres_x10"]), "__setitem__", full)
        writer.write("superres_x10", slice(0, 3), slice(0, 40), slice(0, 30), np.zeros((3, 40, 30)))
    assert set(opened(path).images) == {"he"} and nothing_beside(path)


def test_read_only_place(path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(StsrError, match="read-only"):
        write_map(path)


def test_failure_inside_a_swap_is_undone(path, monkeypatch):
    write_map(path, 1.0)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(publishing, "_commit", fail)
    with pytest.raises(KeyboardInterrupt):
        write_map(path, 2.0, overwrite=True)
    assert value_of(path) == 1.0 and catalogue.provenance(path)["superres_x10"]["seed"] == 1
    assert nothing_beside(path)


def test_two_writers_of_one_output(path):
    with MapWriter(path, ["superres_x10"], GENES, GRID), pytest.raises(StsrError, match="another stsr"):
        write_map(path)


# ------------------------------------------------------------------------------------------------------- kills


def test_interrupted_map_keeps_blocks_only_when_asked(path):
    for keep in (False, True):
        with (
            pytest.raises(KeyboardInterrupt),
            MapWriter(path, ["superres_x10"], GENES, GRID, SUPERRES) as writer,
        ):
            writer.write("superres_x10", slice(0, 1), slice(0, 40), slice(0, 30), np.full((1, 40, 30), 5.0))
            writer.mark_done("A", {"error": 0.5})
            writer.keep = keep
            raise KeyboardInterrupt
        assert nothing_beside(path) == (not keep)
    with MapWriter(path, ["superres_x10"], GENES, GRID, SUPERRES) as writer:
        assert writer.is_done("A") and not writer.is_done("B") and writer.notes == {"A": {"error": 0.5}}
        writer.write("superres_x10", slice(1, 3), slice(0, 40), slice(0, 30), np.full((2, 40, 30), 5.0))
    assert value_of(path) == 5.0 and nothing_beside(path)


def test_another_command_does_not_take_up_blocks(path):
    with pytest.raises(KeyboardInterrupt), MapWriter(path, ["superres_x10"], GENES, GRID, SUPERRES) as writer:
        writer.write("superres_x10", slice(0, 3), slice(0, 40), slice(0, 30), np.full((3, 40, 30), 5.0))
        writer.mark_done("A")
        writer.keep = True
        raise KeyboardInterrupt
    with MapWriter(path, ["superres_x10"], GENES, GRID, {"superres_x10": {"seed": 2}}) as writer:
        assert not writer.is_done("A")
    assert value_of(path) == 0.0


NURSERY = """
import os, signal, sys
import numpy as np
import spatialdata, zarr  # once, for all the children
from spatialdata.models import Image2DModel
from stsr.store.writer import MapWriter
from stsr.store import section
from stsr.geometry.grid import Grid

NAMES = ["superres_x10", "superres_x10_sd"]

def write(path, value, then=lambda: None):
    provenance = {name: {"command": "superres", "value": value} for name in NAMES}
    grid = Grid(100.0, 200.0, 10.0, 40, 30)
    with MapWriter(path, NAMES, ["A", "B", "C"], grid, provenance, overwrite=True) as writer:
        for name in NAMES:
            if not writer.is_done(name):
                writer.write(name, slice(0, 3), slice(0, 40), slice(0, 30), np.full((3, 40, 30), value))
                writer.mark_done(name)
        then()

def die_at(path, step):
    left = [step]
    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)
        return call
    def arm():
        os.rename, os.replace = counted(os.rename), counted(os.replace)
    write(path, 2.0, arm)

def loop(path):
    value = 1.0
    write(path, value)
    print(os.getpid(), flush=True)
    while True:
        value += 1
        write(path, value)

for line in sys.stdin:
    path, _, step = line.strip().partition(" ")
    child = os.fork()
    if child == 0:
        die_at(path, int(step)) if step else loop(path)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """A process that has imported everything and forks a child for each line of input."""
    script = tmp_path_factory.mktemp("nursery") / "nursery.py"
    script.write_text(NURSERY)
    with subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        yield process
        process.stdin.close()
        process.wait(timeout=30)


def test_kill_before_every_single_step_of_a_swap(path, nursery):
    """A replacing publication stops dead before its n-th change on disk, for every n."""
    write_map(path, 1.0)
    codes = []
    for step in range(60):
        nursery.stdin.write(f"{path} {step}\n")
        codes.append(int(nursery.stdout.readline()))
        sdata = opened(path)  # opens in every state
        assert set(sdata.images) <= {"he", "superres_x10", "superres_x10_sd"}, step
        for name in set(sdata.images) - {"he"}:
            assert np.unique(np.asarray(sdata.images[name].data)).tolist() in ([1.0], [2.0])
        if codes[-1] == 0:
            break
        publishing.publish(path, {"other": labels(step)}, {"other": {}}, overwrite=True)  # repairs first
        assert "superres_x10" in opened(path).images
    assert codes[-1] == 0 and len(codes) > 5 and set(codes[:-1]) == {-signal.SIGKILL}
    assert value_of(path) == value_of(path, "superres_x10_sd") == 2.0
    publishing.publish(path, {"last": labels(0)}, {"last": {}})
    assert nothing_beside(path)


def test_kill_at_random_moments(path, nursery):
    rng, seen = random.Random(0), []
    for _ in range(10):
        nursery.stdin.write(f"{path}\n")
        child = int(
            nursery.stdout.readline()
        )  # its first map is published; the kill comes during the next ones
        time.sleep(0.4 * rng.random())
        os.kill(child, signal.SIGKILL)
        assert int(nursery.stdout.readline()) == -signal.SIGKILL
        sdata = opened(path)
        found = {
            name: np.unique(np.asarray(sdata.images[name].data)).tolist()
            for name in set(sdata.images) - {"he"}
        }
        assert all(len(values) == 1 for values in found.values())
        assert len({values[0] for values in found.values()}) <= 1  # both or neither
        for name, values in found.items():
            assert catalogue.provenance(path)[name]["value"] == values[0]
            seen.append(values[0])
    assert len(seen) > 5
    write_map(path, 77.0, overwrite=True)
    assert value_of(path) == 77.0 and nothing_beside(path)


def test_killed_create_is_done_again(tmp_path):
    path = tmp_path / "s.zarr"
    left = tmp_path / ".s.zarr.stsr-new" / "new.zarr"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    publishing.create(path, section(), {"he": {}})
    assert set(opened(path).images) == {"he"} and nothing_beside(path)


def test_damaged_root_is_one_sentence(path):
    file = path / (".zattrs" if catalogue.zarr_format(path) == 2 else "zarr.json")
    file.write_text(json.dumps({"attributes": {}})[:-4])
    with pytest.raises(StsrError, match="damaged"):
        catalogue.provenance(path)
