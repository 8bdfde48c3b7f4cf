"""Areas of cells in bins against cases whose truth is known; outlines from every format; nuclei on a simulated H&E."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
import shapely
import tifffile
import zarr
from scipy import stats
from scipy.spatial import cKDTree

from stsr.errors import StsrError, UsageError
from stsr.geometry import outlines
from stsr.geometry.grid import Grid
from stsr.histology.image import Image
from stsr.simulate import image_frame, render_he, write_xenium
from stsr.store.parts import Spots
from stsr.store.section import open_section
from stsr.verbs.prepare.verb import prepare
from stsr.verbs.singlecell import areas as cells
from stsr.verbs.singlecell import nuclei, segmentation
from stsr.verbs.singlecell import scores as scoring

GRID = Grid(100.0, 50.0, 10.0, 4, 5)


def box(x0, y0, x1, y1):
    """In bins of GRID."""
    return shapely.box(100 + 10 * x0, 50 + 10 * y0, 100 + 10 * x1, 50 + 10 * y1)


def shares(*polygons, grid=GRID):
    return cells.shares(np.array(polygons), grid).toarray().reshape(len(polygons), *grid.shape)


def random_cells(number, seed=0, spread=(50, 40), radius=(4, 9)):
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    centre = rng.uniform(0, spread, (number, 1, 2)) + np.array([100, 50])
    reach = rng.uniform(*radius, (number, 12, 1))
    return shapely.polygons(centre + reach * np.stack([np.cos(angle), np.sin(angle)], -1))


# ---------------------------------------------------------------------------------------------------------- shares


def test_a_square_between_four_bins():
    part = shares(box(1.5, 0.5, 2.5, 1.5))[0]
    assert part[0:2, 1:3] == pytest.approx(np.full((2, 2), 0.25)) and part.sum() == pytest.approx(1)


def test_a_hole_and_two_pieces():
    ring = box(0, 0, 3, 3).difference(box(1, 1, 2, 2))
    pieces = shapely.union_all([box(0, 3, 0.5, 4), box(4, 3, 5, 4)])
    part = shares(ring, pieces)
    assert part[0, 1, 1] == 0 and part[0].sum() == pytest.approx(8)
    assert part[1, 3] == pytest.approx([0.5, 0, 0, 0, 1])


def test_what_sticks_out_of_the_map_is_left_out():
    part = shares(box(-3, -3, 0.5, 0.5), box(4.5, 3.5, 9, 9), box(7, 7, 8, 8), box(-2, 1, 9, 2))
    assert part.sum((1, 2)) == pytest.approx([0.25, 0.25, 0, 5])


def test_a_place_claimed_twice_is_halved_and_others_keep_theirs():
    whole, half, apart = box(0, 0, 1, 1), box(0, 0, 0.5, 1), box(1, 0, 1.2, 1)
    part = shares(whole, half, apart)
    assert part[:2, 0, 0] == pytest.approx([0.75, 0.25]) and part[2, 0, 1] == pytest.approx(0.2)


def test_a_place_claimed_by_three():
    part = shares(box(0, 0, 3, 1), box(1, 0, 4, 1), box(2, 0, 5, 1))[:, 0]
    expected = [[1, 1 / 2, 1 / 3, 0, 0], [0, 1 / 2, 1 / 3, 1 / 2, 0], [0, 0, 1 / 3, 1 / 2, 1]]
    assert part == pytest.approx(np.array(expected))


def test_shares_add_up_to_the_union_of_many_overlapping_cells():
    polygons = random_cells(25)
    part = shares(*polygons)
    union = shapely.union_all(polygons)
    x, y = np.meshgrid(np.arange(5), np.arange(4))
    bins = shapely.box(100 + 10 * x, 50 + 10 * y, 110 + 10 * x, 60 + 10 * y)
    assert part.sum(0) == pytest.approx(shapely.area(shapely.intersection(bins, union)) / 100, abs=1e-9)
    rng = np.random.default_rng(0)
    points = rng.uniform((100, 50), (150, 90), (40_000, 2))
    inside = shapely.contains_xy(polygons[:, None], *points.T)  # (cells, points)
    claimed = inside / np.maximum(inside.sum(0), 1)
    assert part.sum((1, 2)) == pytest.approx(claimed.mean(1) * 20, abs=0.06)


def test_too_many_cells_on_one_place_are_refused():
    with pytest.raises(StsrError, match="more than 8 cells"):
        shares(*[box(0, 0, 1 + number / 100, 1) for number in range(9)])


class Layer:
    def __init__(self, grid, values):
        self.grid, self.values = grid, values
        self.genes = [f"g{number}" for number in range(len(values))]

    def read(self, genes):
        return self.values[[self.genes.index(gene) for gene in genes]]


def test_counts_in_cells_and_outside_are_the_map(monkeypatch):
    rng = np.random.default_rng(0)
    layer = Layer(GRID, rng.gamma(0.5, 3, (37, 4, 5)).astype(np.float32))
    part = cells.shares(random_cells(9), GRID)
    told = []
    counts, outside, totals = cells.add_up(layer, layer.genes, part, lambda *step: told.append(step))
    assert totals == pytest.approx(layer.values.sum((1, 2), dtype=float))
    assert counts.sum(0, dtype=float) + outside == pytest.approx(totals, rel=1e-6)
    assert outside.min() > 0 and told[-1][:2] == (37, 37)
    assert counts[3, 5] == pytest.approx((part[3].toarray() * layer.values[5].ravel()).sum())
    monkeypatch.setattr(cells, "_BLOCK_BYTES", 1)
    again = cells.add_up(layer, layer.genes, part, lambda *_: None)[0]
    np.testing.assert_allclose(again, counts, rtol=1e-6)


# ------------------------------------------------------------------------------------------------ spots and scores


def test_spots_give_each_cell_their_count_per_area():
    grid = Grid(0, 0, 10, 10, 20)
    spots = Spots(
        np.array([[50.0, 50], [150, 50]]), _sparse([[100.0, 0], [300, 50]]), ["A", "B"], "square", 100.0
    )
    part = cells.shares(np.array([shapely.box(10, 10, 20, 30), shapely.box(95, 0, 105, 10)]), grid)
    found = scoring.spot_values(spots, grid, part, ["B", "A"])
    assert found == pytest.approx(np.array([[0, 2.0], [0.25, 2.0]]))


def test_bilinear_interpolation_is_straight_between_spots_and_level_at_the_rim():
    grid = Grid(0, 0, 10, 20, 40)
    x, y = np.meshgrid(np.arange(50.0, 400, 100), [50.0, 150])
    centres = np.column_stack([x.ravel(), y.ravel()])
    spots = Spots(centres, _sparse(centres[:, :1]), ["A"], "square", 100.0)
    squares = shapely.box([100, 200, 0], [40, 90, 0], [110, 210, 10], [50, 100, 10])
    found = scoring.bilinear_values(spots, grid, cells.shares(squares, grid), ["A"])
    assert found.ravel() == pytest.approx([1.05, 2.05, 0.5])


def test_scores_are_of_genes_over_cells_and_of_cells_over_genes():
    rng = np.random.default_rng(0)
    truth, found = rng.poisson(3, (30, 4)).astype(float), rng.gamma(2, 1, (30, 4))
    truth[:, 3] = 0
    scores = scoring.scores({"map": found}, truth, [f"c{n}" for n in range(30)], list("ABCD"))
    gene, cell = (scores[scores["of"] == of].set_index("name") for of in ("gene", "cell"))
    assert gene.loc["B", "pcc_map"] == pytest.approx(stats.pearsonr(found[:, 1], truth[:, 1])[0])
    assert cell.loc["c7", "pcc_map"] == pytest.approx(stats.pearsonr(found[7], truth[7])[0])
    assert cell.loc["c7", "rmse_map"] == pytest.approx(np.sqrt(np.mean((found[7] - truth[7]) ** 2)))
    assert np.isnan(gene.loc["D", "pcc_map"]) and gene.loc["A", "counts"] == truth[:, 0].sum()


def _sparse(values):
    import scipy.sparse as sp

    return sp.csr_matrix(np.asarray(values, np.float32))


# ---------------------------------------------------------------------------------------------------------- labels


def test_labels_are_traced_along_their_pixels(monkeypatch):
    monkeypatch.setattr(outlines, "_STRIP", 3)  # cells lie across strips
    labels = np.zeros((9, 8), np.int32)
    labels[1:6, 1:5] = 7
    labels[3, 3] = 0  # a hole
    labels[6, 5] = 7  # touches at a corner
    labels[7:, 6:] = 4
    labels[0, 0] = 9
    turned = np.array([[0.0, 2.0, 10.0], [-1.5, 0.5, 20.0], [0, 0, 1]])
    ids, found = outlines.traced(labels, turned)
    assert ids.tolist() == [4, 7, 9]
    assert shapely.area(found) == pytest.approx(3.0 * np.array([4, 20, 1])) and shapely.is_valid(found).all()
    middle = np.argwhere(labels == 7).mean(0)[::-1] + 0.5
    assert shapely.get_coordinates(shapely.centroid(found[1]))[0] == pytest.approx(
        turned[:2, :2] @ middle + turned[:2, 2]
    )


@pytest.mark.parametrize("labels", [np.zeros((3, 3)), np.zeros((2, 3, 3), int)])
def test_what_is_no_label_image(labels):
    with pytest.raises(StsrError, match="integers"):
        outlines.traced(labels, np.eye(3))


# --------------------------------------------------------------------------------------------------------- formats


@pytest.fixture(scope="module")
def section(tissue, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    write_xenium(tissue, folder / "run", labels=False, mirror=True, turn_deg=90)
    return open_section(prepare(folder / "run", folder / "s.zarr", refine=False))


def _polygons(section):
    found = segmentation.stored(section)
    return found.ids, found.polygons


def _feature(name, outline, kind):
    return {
        "type": "Feature",
        "id": name,
        "geometry": shapely.geometry.mapping(outline),
        "nucleusGeometry": shapely.geometry.mapping(outline.buffer(-1)),
        "properties": {"objectType": kind},
    }


def _qupath(section, path, wrap=True):
    """As QuPath exports cells and an annotation, in pixels of the image."""
    um_to_px = np.linalg.inv(section.image.px_to_um)
    ids, polygons = _polygons(section)
    in_px = outlines.moved(polygons, um_to_px)
    features = [_feature(name, outline, "cell") for name, outline in zip(ids, in_px, strict=True)]
    features.append(_feature("tumour", shapely.box(0, 0, 200, 200), "annotation"))
    text = json.dumps({"type": "FeatureCollection", "features": features} if wrap else features)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _vertices(section):
    ids, polygons = _polygons(section)
    corners, part = shapely.get_coordinates(polygons, return_index=True)
    return pd.DataFrame({"cell_id": ids[part], "vertex_x": corners[:, 0], "vertex_y": corners[:, 1]})


@pytest.mark.parametrize(
    "name", ["c.geojson", "c.json.gz", "list.geojson", "b.parquet", "b.csv.gz", "g.parquet", "s"]
)
def test_the_same_cells_from_every_format(section, tmp_path, name):
    import geopandas as gpd

    path = tmp_path / name
    ids, polygons = _polygons(section)
    if "json" in name:
        _qupath(section, path, wrap=name != "list.geojson")
    elif name == "b.parquet":
        _vertices(section).to_parquet(path)
    elif name == "b.csv.gz":
        _vertices(section).to_csv(path, index=False)
    elif name == "g.parquet":
        gpd.GeoDataFrame(geometry=polygons, index=ids).to_parquet(path)
    else:
        path = section.path
    found = segmentation.imported(path, section, section.extent_um)
    order = [found.ids.tolist().index(name) for name in ids]
    assert found.element is None and len(found.ids) == len(ids)
    overlap = shapely.area(shapely.intersection(found.polygons[order], polygons))
    assert overlap == pytest.approx(shapely.area(polygons), rel=1e-3)


@pytest.mark.parametrize("name", ["l.tif", "l.png", "l.zarr"])
def test_label_images_lie_on_the_image(section, tmp_path, name):
    image = section.image
    labels = np.zeros((image.height - 1, image.width), np.uint16)  # an image may have been padded by a pixel
    labels[40:60, 30:45], labels[100:120, 80:100] = 3, 8
    if name == "l.tif":
        tifffile.imwrite(tmp_path / name, labels)
    elif name == "l.png":
        from PIL import Image as Pillow

        Pillow.fromarray(labels).save(tmp_path / name)
    else:
        zarr.create_array(tmp_path / name, data=labels)
    found = segmentation.imported(tmp_path / name, section, section.extent_um)
    assert found.ids.tolist() == [3, 8]
    assert shapely.area(found.polygons) == pytest.approx(np.array([300, 400]) * image.um_per_px**2)
    place = image.px_to_um @ [37.5, 50, 1]
    assert found.centres_um[0] == pytest.approx(place[:2])


def test_circles_keep_their_area_and_bow_ties_are_mended(section):
    import geopandas as gpd

    circles = gpd.GeoDataFrame({"radius": [4.0, 6.0]}, geometry=shapely.points([0, 20], [0, 20]))
    assert shapely.area(outlines.areas(circles)) == pytest.approx(np.pi * np.array([16, 36]))
    bow = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    mended = segmentation._checked(np.array(["a"]), np.array([bow]), "")
    assert shapely.area(mended.polygons) == pytest.approx([50]) and shapely.is_valid(mended.polygons).all()


def test_wrong_units_are_noticed(section, tmp_path):
    _qupath(section, tmp_path / "c.geojson")
    table = _vertices(section)
    table[["vertex_x", "vertex_y"]] *= 30
    table.to_csv(tmp_path / "b.csv", index=False)
    with pytest.raises(StsrError, match="--coordinates px"):
        segmentation.imported(tmp_path / "b.csv", section, section.extent_um)
    with pytest.raises(UsageError, match="um or px, not 'nm'"):
        segmentation.imported(tmp_path / "b.csv", section, section.extent_um, "nm")


# ---------------------------------------------------------------------------------------------------------- nuclei


@pytest.fixture(scope="module")
def histology(tissue):
    px_to_um, _ = image_frame(tissue, 0.8)
    return Image([np.moveaxis(render_he(tissue, 0.8), 2, 0)], px_to_um)


def _nuclei(histology, expand_um=0.0, size=(330, 320)):
    return nuclei.find_nuclei(histology, (0.0, 0.0, *map(float, size)), expand_um, lambda *_: None)


def test_nuclei_are_found_where_they_are(histology, tissue):
    true = tissue.cells.nucleus_um.mean(1)
    found = _nuclei(histology)
    missed, _ = cKDTree(found.centres_um).query(true)
    wrong, _ = cKDTree(true).query(found.centres_um)
    assert (missed < 4).mean() > 0.9 and (wrong < 4).mean() > 0.95
    true_um2 = shapely.area(shapely.polygons(tissue.cells.nucleus_um))
    assert np.median(shapely.area(found.polygons)) == pytest.approx(
        np.median(true_um2), rel=0.5
    )  # a pixel more


def test_tiles_leave_no_seam(histology, monkeypatch):
    whole = _nuclei(histology, 5.0)
    monkeypatch.setattr(nuclei, "_TILE_UM", 110.0)
    tiled = _nuclei(histology, 5.0)
    assert abs(len(tiled.ids) - len(whole.ids)) <= 0.02 * len(whole.ids)
    claimed = shapely.area(tiled.polygons).sum() / shapely.area(shapely.union_all(tiled.polygons))
    assert claimed < 1.01  # cells of two tiles do not lie on each other


def test_expansion_reaches_so_far_and_not_into_neighbours(histology):
    plain, grown = _nuclei(histology), _nuclei(histology, 5.0)
    assert len(plain.ids) == len(grown.ids)
    reach = shapely.hausdorff_distance(plain.polygons, grown.polygons)
    assert np.quantile(reach, 0.99) < 8 and np.median(shapely.area(grown.polygons)) > 2 * np.median(
        shapely.area(plain.polygons)
    )
    assert shapely.area(shapely.union_all(grown.polygons)) == pytest.approx(
        shapely.area(grown.polygons).sum()
    )


def test_images_without_nuclei_are_refused(tissue):
    white = Image([np.full((3, 200, 200), 250, np.uint8)], np.eye(3))
    with pytest.raises(StsrError, match="no nuclei were found"):
        _nuclei(white, size=(200, 200))
    coarse = Image([np.zeros((3, 20, 20), np.uint8)], np.diag([10.8, 10.8, 1]))
    with pytest.raises(StsrError, match=r"10\.8 um, but nuclei need 2\.5 um"):
        _nuclei(coarse)
    with pytest.raises(UsageError, match="--expand-um"):
        _nuclei(white, 21.0)
