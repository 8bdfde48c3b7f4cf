"""The reader of Visium HD against a folder whose counts and alignment are known."""

import json
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from stsr import platforms
from stsr.errors import StsrError
from stsr.platforms import visium_hd
from stsr.platforms.source import Options
from stsr.platforms.visium_hd import matrix
from stsr.simulate import image_frame
from stsr.verbs.prepare.job import default_output

BINNED = "binned_outputs"


def dense(source):
    """All counts (genes, rows, columns) of a stream."""
    counts = np.zeros((len(source.genes), *source.bins.in_tissue.shape), int)
    for chunk in source.bins.chunks():
        keep = chunk.gene >= 0
        np.add.at(
            counts, tuple(axis[keep] for axis in (chunk.gene, chunk.row, chunk.column)), chunk.number[keep]
        )
    return counts


def square(folder, bin_um=8):
    return folder / BINNED / f"square_{bin_um:03d}um"


def positions_file(folder, bin_um=8):
    return square(folder, bin_um) / "spatial" / "tissue_positions.parquet"


def only(folder, tmp_path, bin_um=8, slices=False):
    """A copy of the folder with one bin size."""
    copy = tmp_path / "run"
    shutil.copytree(square(folder, bin_um), square(copy, bin_um))
    shutil.copy(folder / "he_fullres.tif", copy)
    if slices:
        shutil.copy(folder / "feature_slice.h5", copy)
    return copy


def rewrite(folder, key, values, bin_um=8):
    """Replace a dataset of the matrix."""
    with h5py.File(square(folder, bin_um) / "filtered_feature_bc_matrix.h5", "r+") as h5:
        del h5[f"matrix/{key}"]
        h5[f"matrix/{key}"] = values


def read_key(folder, key, bin_um=8):
    with h5py.File(square(folder, bin_um) / "filtered_feature_bc_matrix.h5") as h5:
        return h5[f"matrix/{key}"][:]


def test_counts_and_alignment_are_those_of_the_tissue(tissue, hd_folder):
    source = platforms.read(hd_folder)
    assert (source.platform, source.bins.bin_um, source.facts["counts_bin_um"]) == ("visium_hd", 2.0, 2.0)
    counts = dense(source)
    truth = tissue.counts(2, 0, 0, *counts.shape[:0:-1])
    assert np.array_equal(counts, np.where(source.bins.in_tissue, truth, 0))
    px_to_um, _ = image_frame(tissue, 2.0, True, 80)
    assert np.allclose(source.image.px_to_um, px_to_um, atol=1e-6)
    assert source.facts["positions_misfit_um"] < 1e-3 and not source.warnings


def test_every_folder_of_the_run_is_an_entrance(hd_folder, tmp_path):
    run = tmp_path / "sample"
    (run / "outs").mkdir(parents=True)
    for child in hd_folder.iterdir():
        (run / "outs" / child.name).symlink_to(child)
    shutil.rmtree(tmp_path / "copy", ignore_errors=True)
    shutil.copytree(hd_folder / BINNED, run / "outs" / "copied")
    (run / "outs" / BINNED).unlink()
    (run / "outs" / "copied").rename(run / "outs" / BINNED)
    outs = run / "outs"
    for path in (run, outs, outs / BINNED, square(outs, 2)):
        assert visium_hd.recognises(path)
        source = platforms.read(path)
        assert source.name == "sample" and source.image.path.name == "he_fullres.tif"
        assert source.bins.bin_um == 2 and default_output(path).name == "sample.zarr"
    assert platforms.read(square(outs, 16), Options()).bins.in_tissue.shape == (34, 39)
    renamed = shutil.copytree(square(outs), tmp_path / "my bins")
    assert platforms.read(renamed).bins.bin_um == 8


@pytest.mark.parametrize("bin_um", [8, 16])
def test_one_bin_size_alone_holds_the_same_counts(hd_folder, tmp_path, bin_um):
    copy = only(hd_folder, tmp_path, bin_um)
    fine = dense(platforms.read(hd_folder))
    times = bin_um // 2
    shape = len(fine), fine.shape[1] // times, times, fine.shape[2] // times, times
    assert np.array_equal(dense(platforms.read(copy)), fine.reshape(shape).sum((2, 4)))


def test_feature_slices_give_the_counts_of_2_um(hd_folder, tmp_path):
    source = platforms.read(only(hd_folder, tmp_path, slices=True))
    assert (source.facts["counts_from"], source.bins.bin_um) == ("feature_slice.h5", 2)
    assert np.array_equal(dense(source), dense(platforms.read(hd_folder)))
    shutil.rmtree(tmp_path / "run" / BINNED)  # its mask and transform stand in for the table of positions
    alone = platforms.read(tmp_path / "run")
    assert np.array_equal(dense(alone), dense(source))
    assert np.allclose(alone.image.px_to_um, source.image.px_to_um, atol=1e-6)


def test_feature_slices_have_their_own_tissue(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path, slices=True)
    truth = dense(platforms.read(copy))
    with h5py.File(copy / "feature_slice.h5", "r+") as h5:
        off = h5["masks/filtered/row"][:] < 80
        h5["masks/filtered/data"][...] = np.where(off, 0, 1)
    counts = dense(platforms.read(copy))
    assert truth[:, :80].any() and not counts[:, :80].any()
    assert np.array_equal(counts[:, 80:], truth[:, 80:])
    with h5py.File(copy / "feature_slice.h5", "r+") as h5:
        del h5["masks"]  # then that of the table of positions
    assert np.array_equal(dense(platforms.read(copy)), truth)
    next(copy.rglob("tissue_positions.parquet")).unlink()
    with pytest.raises(StsrError, match="no mask"):
        platforms.read(copy)


def test_slices_are_read_in_pieces(hd_folder, tmp_path, monkeypatch):
    whole = platforms.read(only(hd_folder, tmp_path, slices=True))
    truth = dense(whole)
    for module in (matrix, visium_hd.slices):
        monkeypatch.setattr(module, "ENTRIES", 500)
    sizes = [len(chunk.gene) for chunk in whole.bins.chunks()]
    assert len(sizes) > 20 and max(sizes) < 1500
    assert np.array_equal(dense(whole), truth)
    sizes = [len(chunk.gene) for chunk in platforms.read(hd_folder).bins.chunks()]
    assert len(sizes) > 20 and max(sizes) <= 500


def test_barcodes_are_read_for_row_and_column(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    truth = dense(platforms.read(copy))
    barcodes = read_key(copy, "barcodes")
    rewrite(copy, "barcodes", np.array([name[:-1] for name in barcodes], "S20"))  # cut: "-1" becomes "-"
    assert np.array_equal(dense(platforms.read(copy)), truth)

    table = pd.read_parquet(positions_file(copy))
    other = {name: f"ACGT{number:08d}" for number, name in enumerate(table["barcode"])}
    table["barcode"] = table["barcode"].map(other)
    table.sample(frac=1, random_state=0).to_parquet(positions_file(copy))
    rewrite(copy, "barcodes", np.array([other[name.decode()] for name in barcodes], "S"))
    assert np.array_equal(dense(platforms.read(copy)), truth)

    rewrite(copy, "barcodes", np.array([b"TTTT%08d" % number for number in range(len(barcodes))]))
    with pytest.raises(StsrError, match="missing in the table of positions"):
        dense(platforms.read(copy))


def test_bins_of_another_folder_are_refused(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    shutil.copy(square(hd_folder, 16) / "filtered_feature_bc_matrix.h5", square(copy))
    with pytest.raises(StsrError, match="bins of 16 um"):
        dense(platforms.read(copy))
    barcodes = read_key(hd_folder, "barcodes")
    shutil.copy(square(hd_folder) / "filtered_feature_bc_matrix.h5", square(copy))
    rewrite(copy, "barcodes", np.array([name.replace(b"_000", b"_009") for name in barcodes]))
    with pytest.raises(StsrError, match="outside the array"):
        dense(platforms.read(copy))


def test_only_genes_count_and_symbols_become_unique(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    names, kinds = read_key(copy, "features/name"), read_key(copy, "features/feature_type")
    truth = dense(platforms.read(copy))
    names[1], kinds[2] = names[0], b"Antibody Capture"[: kinds.dtype.itemsize]
    rewrite(copy, "features/name", names)
    rewrite(copy, "features/feature_type", kinds)
    source = platforms.read(copy)
    assert source.genes[:2] == [names[0].decode(), names[0].decode() + "-1"]
    assert len(source.genes) == len(names) - 1
    assert np.array_equal(dense(source), np.delete(truth, 2, 0))
    picked = platforms.read(copy, Options(genes=(source.genes[5], source.genes[1])))
    assert picked.genes == [source.genes[1], source.genes[5]]
    assert np.array_equal(dense(picked), dense(source)[[1, 5]])
    with pytest.raises(StsrError, match="NOGENE"):
        platforms.read(copy, Options(genes=("NOGENE",)))


def test_a_raw_matrix_counts_in_tissue_only(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    truth = dense(platforms.read(copy))
    table = pd.read_parquet(positions_file(copy))
    off = table["array_row"] < 20
    table.loc[off, "in_tissue"] = 0
    table.to_parquet(positions_file(copy))
    file = square(copy) / "filtered_feature_bc_matrix.h5"
    file.rename(file.with_name("raw_feature_bc_matrix.h5"))
    counts = dense(platforms.read(copy))
    assert truth[:, :20].any() and not counts[:, :20].any()
    assert np.array_equal(counts[:, 20:], truth[:, 20:])


# -------------------------------------------------------------------------------------------------- bad input


def test_positions_that_do_not_follow_the_array_are_refused(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    good = pd.read_parquet(positions_file(copy))
    bad = good.copy()
    bad["pxl_row_in_fullres"] = bad["pxl_row_in_fullres"].to_numpy()[::-1].copy()
    bad["pxl_col_in_fullres"] = np.random.default_rng(0).permutation(bad["pxl_col_in_fullres"])
    bad.to_parquet(positions_file(copy))
    with pytest.raises(StsrError, match="do not follow the rows and columns"):
        platforms.read(copy)
    good.drop(columns="array_row").to_parquet(positions_file(copy))
    with pytest.raises(StsrError, match="no column array_row"):
        platforms.read(copy)
    good.assign(in_tissue=0).to_parquet(positions_file(copy))
    with pytest.raises(StsrError, match="no tissue found"):
        platforms.read(copy)
    positions_file(copy).write_bytes(positions_file(hd_folder).read_bytes()[:-500])
    with pytest.raises(StsrError, match="cut short"):
        platforms.read(copy)
    positions_file(copy).unlink()
    with pytest.raises(StsrError, match=r"tissue_positions\.parquet .* missing"):
        platforms.read(copy)
    shutil.copy(hd_folder / "feature_slice.h5", copy)
    assert platforms.read(copy).bins.bin_um == 2


def test_positions_of_another_bin_size_serve(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    truth = platforms.read(copy)
    shutil.copytree(square(hd_folder, 16), square(copy, 16))
    positions_file(copy).unlink()
    source = platforms.read(copy)
    assert np.array_equal(dense(source), dense(truth))
    assert np.allclose(source.image.px_to_um, truth.image.px_to_um, atol=1e-6)


def test_the_pixel_size_is_checked(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    file = square(copy) / "spatial" / "scalefactors_json.json"
    factors = json.loads(file.read_text())
    file.write_text(json.dumps({**factors, "microns_per_pixel": 0.5}))
    with pytest.raises(StsrError, match=r"gives 0\.5 um per pixel"):
        platforms.read(copy)
    assert platforms.read(copy, Options(um_per_px=2.0)).image is not None
    file.write_text("{")
    with pytest.raises(StsrError, match="damaged"):
        platforms.read(copy)
    file.unlink()
    assert any("scalefactors_json.json is missing" in line for line in platforms.read(copy).warnings)


def test_hires_stands_in_for_the_full_image(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    full = platforms.read(copy).image
    (copy / "he_fullres.tif").unlink()
    source = platforms.read(copy)
    assert any("full-resolution" in line for line in source.warnings)
    assert np.allclose(source.image.bounds_um, full.bounds_um, atol=3)
    given = platforms.read(copy, Options(he=hd_folder / "he_fullres.tif")).image
    assert np.array_equal(given.px_to_um, full.px_to_um)
    (square(copy) / "spatial" / "tissue_hires_image.png").unlink()
    without = platforms.read(copy)
    assert without.image is None and any("no image" in line for line in without.warnings)


def test_another_image_is_refused(hd_folder, tmp_path):
    with Image.open(square(hd_folder) / "spatial" / "tissue_hires_image.png") as image:
        image.resize((90, 80)).save(tmp_path / "small.png")
    with pytest.raises(StsrError, match="not the image that Space Ranger was run on"):
        platforms.read(hd_folder, Options(he=tmp_path / "small.png"))


def test_a_cytassist_image_is_not_taken_for_the_microscope_image(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    Image.new("RGB", (900, 900)).save(copy / "sample_image.tif")  # of public data sets: the CytAssist's
    (copy / "he_fullres.tif").rename(copy / "sample_tissue_image.tif")
    assert platforms.read(copy).image.path.name == "sample_tissue_image.tif"


@pytest.mark.parametrize("file", ["filtered_feature_bc_matrix.h5", "feature_slice.h5"])
def test_truncated_files_are_refused(hd_folder, tmp_path, file):
    copy = only(hd_folder, tmp_path, slices=file == "feature_slice.h5")
    damaged = next(copy.rglob(file))
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(StsrError, match="damaged or cut short"):
        dense(platforms.read(copy))


def test_counts_that_are_not_raw_are_refused(hd_folder, tmp_path):
    copy = only(hd_folder, tmp_path)
    data = read_key(copy, "data")
    rewrite(copy, "data", np.log1p(data))
    with pytest.raises(StsrError, match="not raw counts"):
        dense(platforms.read(copy))
    rewrite(copy, "data", -data)
    with pytest.raises(StsrError, match="negative"):
        dense(platforms.read(copy))
    rewrite(copy, "data", data[:-9])
    with pytest.raises(StsrError, match="damaged"):
        dense(platforms.read(copy))
    next(copy.rglob("*.h5")).unlink()
    with pytest.raises(StsrError, match=r"filtered_feature_bc_matrix\.h5 .* missing"):
        platforms.read(copy)


# ---------------------------------------------------------------------------------------- stores of other tools


@pytest.mark.filterwarnings("ignore")  # of the other tool
@pytest.mark.parametrize("by_labels", [False, True])
def test_stores_by_spatialdata_io(hd_folder, tmp_path, by_labels):
    spatialdata_io = pytest.importorskip("spatialdata_io")
    sdata = spatialdata_io.visium_hd(
        hd_folder,
        dataset_id="sim",
        bin_size=[8, 16],
        annotate_table_by_labels=by_labels,
        fullres_image_file=hd_folder / "he_fullres.tif",
        load_segmentations_only=False,
    )
    sdata.write(tmp_path / "hd.zarr")
    source = platforms.read(tmp_path / "hd.zarr")
    direct = platforms.read(square(hd_folder))
    assert (source.platform, source.bins.bin_um) == ("spatialdata", 8)
    height, width = np.minimum(source.bins.in_tissue.shape, direct.bins.in_tissue.shape)
    assert np.array_equal(dense(source)[:, :height, :width], dense(direct)[:, :height, :width])
    assert dense(source).sum() == dense(direct).sum()
    assert np.allclose(source.image.px_to_um, direct.image.px_to_um, atol=1e-6)
    assert (source.bins.in_tissue[:height, :width] == direct.bins.in_tissue[:height, :width]).mean() > 0.95
