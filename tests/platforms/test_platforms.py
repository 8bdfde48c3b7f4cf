"""Each platform's reader against a section whose truth is known."""

import gzip
import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stsr import platforms
from stsr.errors import StsrError
from stsr.geometry.grid import Grid
from stsr.histology import files as he
from stsr.histology.image import scaling
from stsr.histology.tissue import from_density, from_image
from stsr.platforms.source import Chunk, Options, Transcripts, choose_genes
from stsr.simulate import write_visium, write_xenium
from stsr.verbs.prepare import fit
from stsr.verbs.prepare.binning import GENES_PER_BLOCK, Counter
from stsr.verbs.prepare.counting import count, grid_over


@pytest.fixture(scope="module")
def xenium(tissue, tmp_path_factory):
    return write_xenium(tissue, tmp_path_factory.mktemp("x") / "run", image_um_per_px=2.0, labels=False)


def totals(source):
    """Counts per gene over the whole stream, and what was dropped."""
    counts, low, other = np.zeros(len(source.genes), int), 0, 0
    for chunk in source.transcripts.chunks():
        counts += np.bincount(chunk.gene, minlength=len(counts))
        low, other = low + chunk.low_quality, other + chunk.other
    return counts, low, other


# -------------------------------------------------------------------------------------------------- counting


def test_counter_equals_a_dense_count():
    rng = np.random.default_rng(0)
    genes, places = 2 * GENES_PER_BLOCK + 5, 77
    gene, place = rng.integers(0, genes, 5000), rng.integers(0, places, 5000)
    counter = Counter(genes, places)
    for part in np.array_split(np.arange(5000), 7):
        counter.add(gene[part], place[part])
    truth = np.zeros((genes, places), int)
    np.add.at(truth, (gene, place), 1)
    assert np.array_equal(np.concatenate([counter.block(b) for b in range(counter.blocks)]), truth)
    assert np.array_equal(counter.per_gene, truth.sum(1))
    assert np.array_equal(counter.per_place, truth.sum(0))
    group = rng.integers(0, 9, places)
    grouped = np.concatenate([counter.grouped(b, group, 9) for b in range(counter.blocks)])
    assert np.array_equal(grouped, truth @ np.eye(9, dtype=int)[group])


def test_counter_takes_wide_numbers_only_when_needed():
    counter = Counter(1, 2)
    counter.add(np.zeros(65_535, int), np.zeros(65_535, int))
    assert counter.dtype == np.uint16
    counter.add(np.zeros(1, int), np.zeros(1, int))
    assert counter.dtype == np.uint32
    assert counter.block(0, counter.dtype)[0, 0] == 65_536


def test_discs_count_the_transcripts_that_lie_in_them():
    rng = np.random.default_rng(3)
    x, y = rng.uniform(0, 600, (2, 200_000)).astype(np.float32)
    stream = Transcripts(lambda: iter([Chunk(x, y, np.zeros(len(x), int))]), (0.0, 0.0, 600.0, 600.0))
    for bin_um in (10, 50):  # where transcripts lie must not depend on the bins
        spots = count(stream, ["A"], bin_um, "visium").spots
        distance = np.hypot(*(np.stack([x, y])[:, :, None] - spots.centres_um.T[:, None, :]))
        assert np.array_equal(np.asarray(spots.counts.X.todense())[:, 0], (distance <= 27.5).sum(0))
        assert len(spots.centres_um) > 30


def test_grid_starts_at_a_whole_bin_and_holds_the_far_edge():
    grid = grid_over((-0.5, 103.0, 190.0, 203.0), 10)
    assert (grid.x0_um, grid.y0_um) == (-10, 100)
    assert grid.shape == (20, 20 + 10)  # 190 is the corner of the next bin, and must be inside
    assert grid.rows_columns([190.0], [203.0])[2].all()


def test_tissue_follows_the_density_and_ends_where_it_ends():
    grid = Grid(0, 0, 10, 60, 60)
    counts = np.random.default_rng(0).poisson(8, grid.shape)
    counts[:, 30:] = 0
    counts[20:22, 10:13] = 0  # a hole in tissue is tissue
    mask = from_density(counts, grid)
    assert mask[:, :29].all() and not mask[:, 32:].any()
    assert not from_density(np.zeros(grid.shape, int), grid).any()


def test_tissue_of_an_image_is_what_is_stained():
    rgb = np.full((3, 60, 60), 245, np.uint8)
    assert not from_image(rgb, 10).any()
    rgb[:, :, :30] = np.array([170, 90, 150])[:, None, None]
    mask = from_image(rgb, 10)
    assert mask[:, :27].all() and not mask[:, 34:].any()


# ---------------------------------------------------------------------------------------------------- xenium


@pytest.mark.parametrize("xoa", ["1.0", "2.0", "3.0"])
def test_xenium_versions_read_alike(tissue, tmp_path, xoa):
    folder = write_xenium(tissue, tmp_path / "run", xoa=xoa, image_um_per_px=4.0, labels=False)
    source = platforms.read(folder)
    counts, low, other = totals(source)
    assert source.genes == list(tissue.genes)
    assert low > 0 and other > 0
    in_cells = np.asarray(source.cells.counts.X.sum(0)).ravel()
    assert len(source.cells.outlines) == len(tissue.cells)
    assert np.all(counts >= in_cells) and in_cells.sum() > 0.5 * counts.sum()
    assert source.cells.outlines.is_valid.all()
    assert source.warnings == []


def test_xenium_matrix_equals_the_transcripts_in_cells(tissue, xenium):
    source = platforms.read(xenium)
    table = pq.read_table(
        xenium / "transcripts.parquet", columns=["cell_id", "feature_name", "qv"]
    ).to_pandas()
    table = table[(table.qv >= 20) & (table.cell_id != "UNASSIGNED")]
    expected = table.groupby("feature_name", observed=True).size().reindex(source.genes, fill_value=0)
    assert np.array_equal(np.asarray(source.cells.counts.X.sum(0)).ravel(), expected.to_numpy())


def test_xenium_csv_is_read_like_parquet(xenium, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(xenium, folder)
    for name in ("transcripts", "cells", "cell_boundaries"):
        pq.read_table(folder / f"{name}.parquet").to_pandas().to_csv(folder / f"{name}.csv.gz", index=False)
        (folder / f"{name}.parquet").unlink()
    old, new = platforms.read(folder), platforms.read(xenium)
    assert all(np.array_equal(a, b) for a, b in zip(totals(old), totals(new), strict=True))
    assert old.transcripts.bounds_um == pytest.approx(new.transcripts.bounds_um, abs=1e-3)
    assert old.cells.outlines.area.sum() == pytest.approx(new.cells.outlines.area.sum(), rel=1e-4)


def test_xenium_without_boundaries_draws_discs_and_says_so(xenium, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(xenium, folder)
    (folder / "cell_boundaries.parquet").unlink()
    source = platforms.read(folder)
    assert any("cell_boundaries" in warning for warning in source.warnings)
    area = pd.read_parquet(folder / "cells.parquet")["cell_area"].sum()
    assert source.cells.outlines.area.sum() == pytest.approx(area, rel=0.02)


def test_xenium_without_he_is_read_with_a_warning(xenium, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(xenium, folder)
    (folder / "he_image.ome.tif").unlink()
    source = platforms.read(folder)
    assert source.image is None
    assert any("--he" in warning for warning in source.warnings)


def test_xenium_quality_and_genes_are_chosen(xenium):
    everything = totals(platforms.read(xenium, Options(min_qv=0)))
    assert everything[1] == 0
    some = platforms.read(xenium, Options(genes=("ERBB2", "GATA3")))
    assert sorted(some.genes) == ["ERBB2", "GATA3"]
    assert list(some.cells.counts.var_names) == some.genes
    all_genes = platforms.read(xenium)
    place = [all_genes.genes.index(gene) for gene in some.genes]
    assert np.array_equal(totals(some)[0], totals(all_genes)[0][place])


def test_xenium_statistics_that_are_missing_are_made_up_for(xenium, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(xenium, folder)
    table = pq.read_table(folder / "transcripts.parquet")
    pq.write_table(table, folder / "transcripts.parquet", write_statistics=False)
    assert platforms.read(folder).transcripts.bounds_um == platforms.read(xenium).transcripts.bounds_um


def test_unknown_gene_is_refused_with_near_names():
    with pytest.raises(StsrError, match="GATA3"):
        choose_genes(["GATA3", "LUM"], ("GATA4",), "here")


# ------------------------------------------------------------------------------------------------- the image


@pytest.mark.parametrize(("mirror", "turn"), [(False, 0), (True, 0), (True, 7.0), (False, 90)])
def test_image_lies_where_the_cells_are(tissue, tmp_path, mirror, turn):
    folder = write_xenium(
        tissue, tmp_path / "run", image_um_per_px=2.0, mirror=mirror, turn_deg=turn, labels=False
    )
    source = platforms.read(folder)
    assert np.sign(np.linalg.det(source.image.px_to_um)) == (-1 if mirror else 1)
    counted = count(source.transcripts, source.genes, 10)
    counts = counted.counter.per_place.reshape(counted.grid.shape)
    assert fit.overlap(source.image, counts, counted.grid) > 0.95
    agreement, doubts = fit.fit(source.image, counts, counted.grid)
    assert doubts == [] and agreement > 0.15


def test_pyramid_of_a_tiff_is_used(tmp_path):
    import tifffile

    rgb = np.random.default_rng(0).integers(0, 255, (512, 640, 3), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "he.ome.tif", ome=True) as tiff:
        options = {"tile": (128, 128), "photometric": "rgb"}
        tiff.write(rgb, subifds=1, metadata={"PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}, **options)
        tiff.write(rgb[::2, ::2], subfiletype=1, **options)
    levels, um = he.open_levels(tmp_path / "he.ome.tif")
    assert [level.shape for level in levels] == [(3, 512, 640), (3, 256, 320)]
    assert um == 0.5
    assert np.array_equal(levels[0].compute(), rgb.transpose(2, 0, 1))
    assert np.array_equal(levels[1].compute(), rgb[::2, ::2].transpose(2, 0, 1))


@pytest.mark.parametrize(
    "text", ["", "1,0\n0,1", "1,0,0\n0,x,0\n0,0,1", "1,1,0\n1,1,0\n0,0,1", "1,0,0\n0,1,0\n0,1,1"]
)
def test_what_is_no_affine_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(StsrError, match="alignment"):
        he.read_alignment(tmp_path / "a.csv")


def test_implausible_pixels_are_refused():
    he.check_pixel(scaling(0.5), 0.52, "he")
    with pytest.raises(StsrError, match="--um-per-px"):
        he.check_pixel(scaling(0.001), None, "he")
    with pytest.raises(StsrError, match=r"gives 0\.5 um"):
        he.check_pixel(scaling(1.0), 0.5, "he")
    with pytest.raises(StsrError, match="alignment"):
        he.check_pixel(np.diag([1.0, 2.0, 1.0]), None, "he")


# ------------------------------------------------------------------------------------------------- the others


@pytest.mark.parametrize("version", [1, 2])
def test_visium_tables_of_both_versions(tissue, tmp_path, version):
    folder = write_visium(tissue, tmp_path / "run" / "outs", version=version, image_um_per_px=2.0)
    source = platforms.read(tmp_path / "run")
    assert source.name == "run"
    assert source.image.um_per_px == pytest.approx(2.0, rel=0.02)
    positions = pd.read_csv(
        next((folder / "spatial").glob("tissue_positions*")), header=None if version == 1 else 0
    ).set_axis(["barcode", "in", "row", "col", "y", "x"], axis=1)
    positions = positions[positions["in"] == 1].set_index("barcode").loc[source.spots.counts.obs_names]
    scale = source.facts["um_per_fullres_px"]
    assert np.allclose(source.spots.centres_um, positions[["x", "y"]] * scale, rtol=1e-5)
    truth = tissue.counts_in_discs(positions[["x", "y"]].to_numpy() * 2.0, 27.5)
    assert (truth != source.spots.counts.X).nnz == 0


def test_visium_without_full_image_takes_hires_and_warns(tissue, tmp_path):
    folder = write_visium(tissue, tmp_path / "run", image_um_per_px=1.0)
    full = platforms.read(folder)
    (folder / "he_fullres.tif").unlink()
    hires = platforms.read(folder)
    assert any("hires" in warning for warning in hires.warnings)
    assert hires.image.bounds_um == pytest.approx(full.image.bounds_um, abs=2 * hires.image.um_per_px)
    assert np.array_equal(hires.spots.centres_um, full.spots.centres_um)


def test_visium_with_another_image_is_refused(tissue, tmp_path):
    folder = write_visium(tissue, tmp_path / "run", image_um_per_px=2.0)
    small = folder / "spatial" / "tissue_lowres_image.png"
    from PIL import Image

    with Image.open(small) as image:
        image.resize((image.width // 4, image.height // 4)).save(tmp_path / "small.png")
    with pytest.raises(StsrError, match="not the image that Space Ranger was run on"):
        platforms.read(folder, Options(he=tmp_path / "small.png"))


def legacy(folder, image_px=(400, 500)):
    """ST tables with spots every 40 px, so 5 um per px."""
    from PIL import Image

    rng = np.random.default_rng(0)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(2, 8), np.arange(3, 9)))
    new_x, new_y = x + rng.normal(0, 0.02, x.size), y + rng.normal(0, 0.02, x.size)
    spots = pd.DataFrame({"x": x, "y": y, "new_x": new_x, "new_y": new_y})
    spots["pixel_x"], spots["pixel_y"], spots["selected"] = 40 * new_x + 3, 40 * new_y + 5, 1
    spots.loc[0, "selected"] = 0
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)
    counts = pd.DataFrame(rng.poisson(3, (x.size, 7)), columns=list("ABCDEFG"))
    counts.index = [f"{i}x{j}" for i, j in zip(x, y, strict=True)]
    counts.to_csv(folder / "counts.tsv.gz", sep="\t")
    Image.fromarray(rng.integers(0, 255, (image_px[1], image_px[0], 3), dtype=np.uint8)).save(
        folder / "image.jpg"
    )
    return counts


def test_legacy_st_takes_its_scale_from_the_lattice(tmp_path):
    counts = legacy(tmp_path)
    source = platforms.read(tmp_path)
    assert source.platform == "legacy_st"
    assert source.image.um_per_px == pytest.approx(5.0, rel=1e-3)
    assert source.spots.size_um == 100 and source.spots.counts.n_obs == len(counts) - 1
    name = source.spots.counts.obs_names[5]
    assert np.array_equal(np.asarray(source.spots.counts[name].X.todense()).ravel(), counts.loc[name])


def test_legacy_st_with_a_shrunk_image_is_refused(tmp_path):
    legacy(tmp_path, image_px=(80, 100))
    with pytest.raises(StsrError, match="made smaller"):
        platforms.read(tmp_path)


def test_fractions_are_not_raw_counts(tmp_path):
    counts = legacy(tmp_path)
    (counts / 3).to_csv(tmp_path / "counts.tsv.gz", sep="\t")
    with pytest.raises(StsrError, match="raw counts"):
        platforms.read(tmp_path)


def cells_h5ad(folder, scale=1.0, image=True):
    import anndata
    import scipy.sparse as sp
    from PIL import Image

    rng = np.random.default_rng(0)
    table = anndata.AnnData(sp.csr_matrix(rng.poisson(1.0, (600, 5)).astype(np.float32)))
    table.var_names = list("ABCDE")
    table.obsm["spatial"] = rng.uniform(0, 500, (600, 2)) * scale
    table.write_h5ad(folder / "cells.h5ad")
    if image:
        Image.fromarray(rng.integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(folder / "he.png")
    return table


def test_anndata_of_cells_keeps_every_count(tmp_path):
    table = cells_h5ad(tmp_path)
    np.savetxt(tmp_path / "he_px_to_um.csv", np.diag([9.0, 9.0, 1.0]), delimiter=",")
    source = platforms.read(tmp_path)
    assert np.array_equal(totals(source)[0], np.asarray(table.X.sum(0)).ravel())
    assert source.image.um_per_px == pytest.approx(9.0)
    assert len(source.cells.outlines) == 600 and "radius" in source.cells.outlines


def test_anndata_in_pixels_wants_the_pixel_size(tmp_path):
    cells_h5ad(tmp_path, scale=1e-3, image=False)
    with pytest.raises(StsrError, match="--um-per-px"):
        platforms.read(tmp_path / "cells.h5ad")
    source = platforms.read(tmp_path / "cells.h5ad", Options(um_per_px=1000.0))
    assert source.transcripts.bounds_um[2] == pytest.approx(500, abs=10)


def test_anndata_image_without_alignment_is_refused(tmp_path):
    cells_h5ad(tmp_path)
    with pytest.raises(StsrError, match=r"he_px_to_um\.csv"):
        platforms.read(tmp_path)


def test_anndata_of_visium_is_spots(tissue, tmp_path):
    import scanpy as sc

    folder = write_visium(tissue, tmp_path / "run", image_um_per_px=2.0)
    direct = platforms.read(folder)
    table = sc.read_10x_h5(folder / "filtered_feature_bc_matrix.h5")
    positions = pd.read_csv(folder / "spatial" / "tissue_positions.csv", index_col=0).loc[table.obs_names]
    table.obs = positions[["in_tissue", "array_row", "array_col"]]
    table.obsm["spatial"] = positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()
    factors = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    from PIL import Image

    hires = np.asarray(Image.open(folder / "spatial" / "tissue_hires_image.png"))
    table.uns["spatial"] = {"s": {"images": {"hires": hires / 255.0}, "scalefactors": factors}}
    table.write_h5ad(tmp_path / "visium.h5ad")
    source = platforms.read(tmp_path / "visium.h5ad")
    assert np.allclose(source.spots.centres_um, direct.spots.centres_um)
    assert (source.spots.counts.X != direct.spots.counts.X).nnz == 0
    expected = direct.image.um_per_px / factors["tissue_hires_scalef"]
    assert source.image.um_per_px == pytest.approx(expected, rel=1e-3)


def test_nothing_known_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path, words in ((tmp_path, "experiment.xenium"), (tmp_path / "no", "nothing at")):
        with pytest.raises(StsrError, match=words):
            platforms.read(path)
    with gzip.open(tmp_path / "outs.gz", "w") as file:
        file.write(b"x")
    with pytest.raises(StsrError, match="unpack"):
        platforms.read(tmp_path / "outs.gz")


def test_text_may_be_bytes_or_large(xenium, tmp_path):
    """XOA 1.x writes names as bytes, later versions as large strings; dictionaries may be plain."""
    for number, kind in enumerate((pa.binary(), pa.large_string())):
        folder = tmp_path / str(number)
        shutil.copytree(xenium, folder)
        table = pq.read_table(folder / "transcripts.parquet")
        names = table.column("feature_name").cast(pa.string()).cast(kind)
        table = table.set_column(table.schema.get_field_index("feature_name"), "feature_name", names)
        pq.write_table(table, folder / "transcripts.parquet", use_dictionary=number == 0)
        assert np.array_equal(totals(platforms.read(folder))[0], totals(platforms.read(xenium))[0])
