"""`stsr.prepare`: a folder becomes a section, or one sentence explains why not."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid, add_up
from stsr.histology.image import Image
from stsr.platforms.source import Options
from stsr.simulate import simulate_tissue, write_visium, write_xenium
from stsr.store import catalogue
from stsr.store.section import open_section
from stsr.verbs.prepare.job import PrepareJob
from stsr.verbs.prepare.verb import prepare


@pytest.fixture(scope="module")
def tissue():
    return simulate_tissue(500, 400, seed=2)


@pytest.fixture(scope="module")
def folder(tissue, tmp_path_factory):
    path = tmp_path_factory.mktemp("xenium") / "run"
    return write_xenium(tissue, path, image_um_per_px=0.75, mirror=True, turn_deg=3, labels=False)


@pytest.fixture(scope="module")
def section(folder, tmp_path_factory):
    return open_section(prepare(folder, tmp_path_factory.mktemp("out") / "s.zarr"))


@pytest.fixture
def broken(folder, tmp_path):
    copy = tmp_path / "in" / "run"
    shutil.copytree(folder, copy)
    return copy


def truth(tissue, grid):
    """Counts (genes, height, width) of good transcripts, straight from the table."""
    t = tissue.transcripts
    names = np.array(tissue.features)[t.feature]
    genes = {gene: number for number, gene in enumerate(tissue.genes)}
    gene = np.array([genes.get(name, -1) for name in names])
    rows, columns, inside = grid.rows_columns(t.x_um.astype(np.float32), t.y_um.astype(np.float32))
    keep = (t.qv >= 20) & (gene >= 0) & inside
    counts = np.zeros((len(genes), *grid.shape), int)
    np.add.at(counts, (gene[keep], rows[keep], columns[keep]), 1)
    return counts


# ---------------------------------------------------------------------------------------------- what is made


def test_store_has_the_elements_of_the_design(section):
    assert section.elements == {
        "he": "images",
        "hr_10um": "images",
        "tissue": "labels",
        "support": "labels",
        "spots": "shapes",
        "cells": "shapes",
        "spots_table": "tables",
        "cells_table": "tables",
    }
    made = section.provenance
    assert set(made) == set(section.elements)
    assert made["spots"]["origin"] == "simulated" and made["hr_10um"]["origin"] == "measured"
    assert made["hr_10um"]["min_qv"] == 20 and made["hr_10um"]["dropped_low_quality"] > 0
    assert section.frame.um_per_unit == 1.0
    json.dumps(section.describe())


def test_bins_are_the_truth(tissue, section):
    expected = truth(tissue, section.hr.grid)
    assert np.array_equal(section.hr.read(list(tissue.genes)), expected)
    assert section.hr.read().dtype == np.uint16


def test_squares_are_sums_of_bins(section):
    grid = section.hr.grid.at(100)
    sums = add_up(section.hr.read().astype(int), 10)  # (genes, h, w)
    rows, columns, inside = grid.rows_columns(*section.spots.centres_um.T)
    assert inside.all() and section.spots.shape == "square" and section.spots.size_um == 100
    assert np.array_equal(np.asarray(section.spots.counts.todense()).T, sums[:, rows, columns])
    added = section.spots.measurement(section.hr.grid).add_up(section.hr.read())
    assert np.array_equal(added, np.asarray(section.spots.counts.todense()))


def test_visium_spots_count_transcripts_in_discs(folder, tissue, tmp_path):
    spots = open_section(prepare(folder, tmp_path / "s.zarr", spots="visium")).spots
    assert spots.shape == "disc" and spots.size_um == pytest.approx(55)
    assert spots.pitch_um == pytest.approx(100, abs=0.1)
    expected = tissue.counts_in_discs(spots.centres_um, 27.5)
    difference = abs(spots.select(list(tissue.genes)) - expected)
    assert difference.sum() <= 2  # positions are written as float32


def test_image_lies_on_the_cells(section, tissue):
    grid = Grid.covering((0, 0, 500, 400), 5)
    covered = section.image.covered(grid)
    assert covered.mean() > 0.95
    stain = 255 - section.image.read(grid).mean(0)
    from scipy.ndimage import zoom

    counts = zoom(section.hr.read().sum(0).astype(float), 2, order=1)
    x, y = int(-section.hr.grid.x0_um // 5), int(-section.hr.grid.y0_um // 5)
    counts = counts[y : y + 80, x : x + 100][: grid.height, : grid.width]
    stain, covered = (
        stain[: counts.shape[0], : counts.shape[1]],
        covered[: counts.shape[0], : counts.shape[1]],
    )
    right = np.corrcoef(stain[covered], counts[covered])[0, 1]
    mirrored = np.corrcoef(stain[:, ::-1][covered], counts[covered])[0, 1]
    assert right > 0.2 and right > mirrored + 0.15


def test_pyramid_levels_lie_on_each_other(section):
    levels = [next(iter(scale.values())) for scale in section.sdata.images["he"].values()]
    for fine, coarse in pairwise(levels):
        assert [size % 2 for size in fine.shape[1:]] == [0, 0]
        assert [size // 2 for size in fine.shape[1:]] == list(coarse.shape[1:])


def test_cells_and_their_counts_belong_together(section, tissue):
    assert len(section.cells.outlines) == len(tissue.cells)
    assert list(section.cells.outlines.index) == list(section.cells.counts.obs_names)
    centres = np.stack([section.cells.counts.obsm["spatial"]])[0]
    assert np.allclose(centres, section.cells.centres_um)


def test_two_runs_give_the_same(folder, section, tmp_path):
    again = open_section(prepare(folder, tmp_path / "s.zarr"))
    assert np.array_equal(again.hr.read(), section.hr.read())
    assert (again.spots.counts != section.spots.counts).nnz == 0


def test_bins_genes_and_quality_are_options(folder, tissue, tmp_path):
    section = open_section(prepare(folder, tmp_path / "s.zarr", bin_um=20, genes=["LUM", "GATA3"], min_qv=0))
    assert section.hr.grid.bin_um == 20 and set(section.hr.genes) == {"LUM", "GATA3"}
    names = np.array(tissue.features)[tissue.transcripts.feature]
    assert section.hr.read(["LUM"]).sum() == (names == "LUM").sum()
    assert section.catalogue.hr_elements == ["hr_20um"]


def test_default_output_is_the_folders_name_here(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(prepare(folder)) == "run.zarr"
    assert catalogue.is_store(tmp_path / "run.zarr")


def test_progress_and_warnings_are_told(folder, tmp_path, broken):
    (broken / "he_image.ome.tif").unlink()
    told, stages = [], []
    prepare(
        broken,
        tmp_path / "s.zarr",
        warn=told.append,
        progress=lambda done, total, stage: stages.append((stage, done / total)),
    )
    assert any("no H&E" in sentence for sentence in told)
    assert stages[0][0] == "counting transcripts" and stages[-1] == ("writing the store", 1.0)
    assert all(0 <= done <= 1 for _, done in stages)
    section = open_section(tmp_path / "s.zarr")
    assert section.image is None and section.provenance["tissue"]["warnings"] == told


def test_he_and_alignment_may_come_from_elsewhere(broken, section, tmp_path):
    image, csv = tmp_path / "slide.tif", tmp_path / "to_px.csv"
    (broken / "he_image.ome.tif").rename(image)
    (broken / "he_imagealignment.csv").rename(csv)
    made = open_section(prepare(broken, tmp_path / "s.zarr", he=image, alignment=csv))
    assert np.array_equal(made.image.px_to_um, section.image.px_to_um)


def test_mirrored_alignment_is_suspected(broken, tmp_path):
    file = broken / "he_imagealignment.csv"
    to_px = np.loadtxt(file, delimiter=",")
    width = tifffile.TiffFile(broken / "he_image.ome.tif").series[0].shape[1]
    mirror = np.array([[-1, 0, width], [0, 1, 0], [0, 0, 1]])
    np.savetxt(file, to_px @ mirror, delimiter=",")
    told = []
    prepare(broken, tmp_path / "s.zarr", warn=told.append)
    assert any("mirrored" in sentence or "rotated" in sentence for sentence in told)


def test_the_command_line_is_kept_with_every_option(folder, tmp_path):
    prepare(folder, tmp_path / "s.zarr", genes=["LUM"], refine=False, organ="Breast")
    made = open_section(tmp_path / "s.zarr")
    assert made.provenance["spots"]["arguments"].endswith("--genes LUM --organ Breast --no-refine")
    assert made.organ == "breast"
    image, csv = (folder / name for name in ("he_image.ome.tif", "he_imagealignment.csv"))
    job = PrepareJob(
        path=folder,
        output=tmp_path / "my store.zarr",
        options=Options(he=image, alignment=csv, um_per_px=0.75, min_qv=0, genes=("LUM", "GATA3")),
        spots="visium",
        bin_um=20,
        refine=False,
        overwrite=True,
    )
    assert shlex.split(job.command) == [
        *("stsr", "prepare", "run", "--output", "my store.zarr", "--spots", "visium", "--bin-um", "20"),
        *("--min-qv", "0", "--um-per-px", "0.75", "--he", image.name, "--alignment", csv.name),
        *("--genes", "LUM,GATA3", "--no-refine", "--overwrite"),
    ]
    plain = PrepareJob(path=folder, output=Path("run.zarr"))
    assert plain.command == "stsr prepare run --bin-um 10 --min-qv 20"


def test_the_image_is_resampled_once_per_alignment(folder, tmp_path, monkeypatch):
    read, alignments = Image.read, []

    def counted(self, grid):
        if not isinstance(self.levels[0], np.ndarray):  # not the small overview in memory
            alignments.append(self.px_to_um.tobytes())
        return read(self, grid)

    monkeypatch.setattr(Image, "read", counted)
    prepare(folder, tmp_path / "s.zarr")
    assert 2 <= len(alignments) <= 5
    assert len(set(alignments)) == len(alignments)


def test_visium_folder_becomes_a_section(tissue, tmp_path):
    write_visium(tissue, tmp_path / "run", image_um_per_px=1.0)
    section = open_section(prepare(tmp_path / "run", tmp_path / "s.zarr"))
    assert section.hr is None and section.provenance["spots"]["origin"] == "measured"
    assert section.spots.pitch_um == pytest.approx(100, rel=0.02)
    grid = section.grid(10)
    centres = section.tissue.read(grid)[grid.rows_columns(*section.spots.centres_um.T)[:2]]
    assert centres.all()


def test_store_of_ours_is_prepared_again_without_loss(section, tmp_path):
    again = open_section(prepare(section.path, tmp_path / "again.zarr"))
    assert np.array_equal(again.hr.read(), section.hr.read()) and again.hr.grid == section.hr.grid
    assert np.array_equal(again.spots.centres_um, section.spots.centres_um)
    assert (again.spots.counts != section.spots.counts).nnz == 0
    assert again.provenance["spots"]["origin"] == "simulated"
    assert np.allclose(again.image.px_to_um, section.image.px_to_um)
    coarse = open_section(prepare(section.path, tmp_path / "coarse.zarr", bin_um=50))
    assert np.array_equal(coarse.hr.read(), add_up(section.hr.read(), 5))
    with pytest.raises(StsrError, match="multiple"):
        prepare(section.path, tmp_path / "odd.zarr", bin_um=4)


@pytest.mark.filterwarnings("ignore")
def test_stores_of_spatialdata_io_are_prepared(folder, section, tissue, tmp_path):
    import spatialdata_io

    images = {"morphology_mip": False, "morphology_focus": False}
    spatialdata_io.xenium(folder, nucleus_labels=False, cells_labels=False, **images).write(
        tmp_path / "x.zarr"
    )
    made = open_section(prepare(tmp_path / "x.zarr", tmp_path / "made.zarr"))
    assert np.array_equal(made.hr.read(section.hr.genes), section.hr.read())
    assert np.allclose(made.image.px_to_um, section.image.px_to_um)
    assert len(made.cells.outlines) == len(tissue.cells)

    run = write_visium(tissue, tmp_path / "run", image_um_per_px=1.0)
    read = spatialdata_io.visium(run, dataset_id="a", fullres_image_file="he_fullres.tif")
    read.write(tmp_path / "v.zarr")
    made, direct = (
        open_section(prepare(path, tmp_path / f"{path.stem}2.zarr")) for path in (tmp_path / "v.zarr", run)
    )
    assert np.allclose(made.spots.centres_um, direct.spots.centres_um, atol=0.5)
    assert (made.spots.counts != direct.spots.counts).nnz == 0


# ----------------------------------------------------------------------------------------------- what is not


def spoil(name):
    def cut(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def remove(name):
    return lambda folder: (folder / name).unlink()


def shift(folder):
    file = folder / "he_imagealignment.csv"
    matrix = np.loadtxt(file, delimiter=",")
    matrix[:2, 2] += 1e5
    np.savetxt(file, matrix, delimiter=",")


def grow(folder):
    file = folder / "he_imagealignment.csv"
    matrix = np.loadtxt(file, delimiter=",")
    matrix[:2, :2] *= 2
    np.savetxt(file, matrix, delimiter=",")


def pixel(value):
    def change(folder):
        file = folder / "experiment.xenium"
        experiment = json.loads(file.read_text()) | {"pixel_size": value}
        file.write_text(json.dumps(experiment))

    return change


def scaled(factor):
    """Coordinates in other units than um."""

    def change(folder):
        names = {"transcripts": ("x_location", "y_location"), "cell_boundaries": ("vertex_x", "vertex_y")}
        for file, columns in names.items():
            table = pq.read_table(folder / f"{file}.parquet")
            for name in columns:
                values = (table.column(name).to_numpy() * factor).astype(np.float32)
                table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
            pq.write_table(table, folder / f"{file}.parquet")

    return change


def without_column(folder):
    table = pq.read_table(folder / "transcripts.parquet").drop_columns(["qv"])
    pq.write_table(table, folder / "transcripts.parquet")


def controls_only(folder):
    table = pq.read_table(folder / "transcripts.parquet")
    names = pa.array(["NegControlProbe_00001"] * len(table))
    table = table.set_column(table.schema.get_field_index("feature_name"), "feature_name", names)
    pq.write_table(table, folder / "transcripts.parquet")


BAD = {
    "no transcripts": (remove("transcripts.parquet"), "transcripts.parquet .* is missing"),
    "cut transcripts": (spoil("transcripts.parquet"), "transcripts.parquet is damaged"),
    "no matrix": (remove("cell_feature_matrix.h5"), "cell_feature_matrix.h5 .* is missing"),
    "cut matrix": (spoil("cell_feature_matrix.h5"), "cell_feature_matrix.h5 is damaged"),
    "cut cells": (spoil("cells.parquet"), "cells.parquet is damaged"),
    "cut boundaries": (spoil("cell_boundaries.parquet"), "cell_boundaries.parquet is damaged"),
    "cut zip": (spoil("cells.zarr.zip"), "cells.zarr.zip is damaged"),
    "cut image": (spoil("he_image.ome.tif"), "he_image.ome.tif is damaged"),
    "cut description": (spoil("experiment.xenium"), "experiment.xenium is damaged"),
    "no description": (remove("experiment.xenium"), "experiment.xenium .* is missing"),
    "no alignment": (remove("he_imagealignment.csv"), "he_imagealignment.csv is missing"),
    "image elsewhere": (shift, "to another image"),
    "image too large": (grow, "--um-per-px"),
    "wrong pixel size": (pixel(2.125), "pixel size of 2.125"),
    "no pixel size": (pixel(None), "pixel size"),
    "half the pixel size": (pixel(0.10625), "--um-per-px"),
    "coordinates in mm": (scaled(1e-3), "must be in um"),
    "coordinates in nm": (scaled(1e3), "must be in um"),
    "coordinates in pixels of 0.01 um": (scaled(30), "diameter"),
    "no quality": (without_column, "no column qv"),
    "controls only": (controls_only, "passes the filters"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(broken, tmp_path, name):
    spoiling, words = BAD[name]
    spoiling(broken)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(StsrError, match=words) as caught:
        prepare(broken, out / "s.zarr")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("compression", ["deflate", "lzw", "jpeg"])
def test_a_damaged_tile_is_one_sentence_and_leaves_nothing(broken, tmp_path, compression):
    """Only the finest level is damaged, which is not read before the store is written."""
    file, out = broken / "he_image.ome.tif", tmp_path / "out"
    rgb = tifffile.imread(file, level=0)
    options = {"tile": (256, 256), "photometric": "rgb", "compression": compression}
    with tifffile.TiffWriter(file, ome=True) as tiff:
        tiff.write(rgb, subifds=1, metadata={"PhysicalSizeX": 0.75, "PhysicalSizeXUnit": "µm"}, **options)
        tiff.write(rgb[::2, ::2], subfiletype=1, **options)
    with tifffile.TiffFile(file) as tiff:
        start, size = tiff.pages[0].dataoffsets[3], tiff.pages[0].databytecounts[3]
    with file.open("r+b") as damaged:
        damaged.seek(start)
        damaged.write(b"\x07" * size)
    out.mkdir()
    with pytest.raises(StsrError, match=r"he_image.ome.tif is damaged.*copy it again") as caught:
        prepare(broken, out / "s.zarr")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    assert list(out.iterdir()) == []


def test_options_are_checked_before_anything_is_read(folder, tmp_path):
    for wrong in (
        {"spots": "round"},
        {"bin_um": 7},
        {"bin_um": 0},
        {"um_per_px": -1},
        {"he": tmp_path / "none.tif"},
    ):
        with pytest.raises(UsageError):
            prepare(folder, tmp_path / "s.zarr", **wrong)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_told(folder, tmp_path):
    out = prepare(folder, tmp_path / "s.zarr", genes=["LUM"])
    with pytest.raises(UsageError, match="--overwrite"):
        prepare(folder, out)
    assert open_section(out).hr.genes == ["LUM"]
    prepare(folder, out, genes=["GATA3"], overwrite=True)
    assert open_section(out).hr.genes == ["GATA3"]
    assert [child.name for child in tmp_path.iterdir() if not child.name.startswith(".")] == ["s.zarr"]


def test_the_input_itself_is_never_the_output(section):
    with pytest.raises(UsageError, match="the input itself"):
        prepare(section.path, section.path, overwrite=True)
    with pytest.raises(StsrError):
        prepare(section.path.parent / "nothing", section.path, overwrite=True)
    assert section.hr.read().sum() > 0


def test_a_place_that_cannot_be_written_is_refused(folder, tmp_path):
    with pytest.raises(StsrError):
        prepare(folder, "/proc/none/s.zarr")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StsrError):
        prepare(folder, tmp_path / "file" / "s.zarr")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    import tempfile

    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full)
        _full_disk_is_told(folder, tmp_path)


def _full_disk_is_told(folder, tmp_path):
    with pytest.raises(StsrError, match="TMPDIR"):
        prepare(folder, tmp_path / "s.zarr")
    assert list(tmp_path.iterdir()) == []


def test_an_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "outs.zip", "w") as archive:
        archive.writestr("experiment.xenium", "{}")
    with pytest.raises(StsrError, match="unpack"):
        prepare(tmp_path / "outs.zip", tmp_path / "s.zarr")


@pytest.mark.parametrize("wait_s", [0.3, 0.8, 1.2])
def test_kill_leaves_nothing_and_the_same_command_finishes(folder, tmp_path, wait_s):
    code = "import sys; from stsr.verbs.prepare.verb import prepare; print('go', flush=True); prepare(*sys.argv[1:])"
    run = [sys.executable, "-c", code, str(folder), str(tmp_path / "s.zarr")]
    process = subprocess.Popen(run, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    process.stdout.readline()
    time.sleep(wait_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    visible = [child.name for child in tmp_path.iterdir() if not child.name.startswith(".")]
    if visible:  # it was faster than the kill
        assert visible == ["s.zarr"]
        assert open_section(tmp_path / "s.zarr").hr.read().sum() > 0
    else:
        prepare(folder, tmp_path / "s.zarr")
    assert open_section(tmp_path / "s.zarr").hr.read().sum() > 0
