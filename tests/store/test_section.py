"""A section gives the same values in um, whichever tool wrote its store and in whichever units."""

import json

import numpy as np
import pytest
import scipy.sparse as sp

from stsr.errors import StsrError, UsageError
from stsr.geometry.grid import Grid
from stsr.store import catalogue, discovery, publishing
from stsr.store.section import open_section
from stsr.store.writer import MapWriter

spatialdata = pytest.importorskip("spatialdata")

UM_PER_PX = 0.37
HR = np.arange(3 * 20 * 10, dtype=np.uint16).reshape(3, 20, 10)


def table(counts, region: str, instances, obs=None, genes=None, **parts):
    import anndata as ad
    import pandas as pd
    from spatialdata.models import TableModel

    obs = pd.DataFrame(obs or {}, index=[f"b{number}" for number in range(len(instances))])
    obs["region"], obs["id"] = pd.Categorical([region] * len(instances)), np.asarray(instances)
    var = pd.DataFrame(index=genes or [f"G{number}" for number in range(counts.shape[1])])
    made = ad.AnnData(counts, obs=obs, var=var, **parts)
    return TableModel.parse(made, region=region, region_key="region", instance_key="id")


def hexagons(rows: int, columns: int):
    """array_row, array_col and ideal um of Visium's lattice."""
    lattice = [(r, c) for r in range(rows) for c in range(r % 2, 2 * columns, 2)]
    array_row, array_col = np.array(lattice).T
    return array_row, array_col, np.stack([array_col * 50.0, array_row * 50 * np.sqrt(3)], axis=1)


def visium_like(tmp_path, order=None, matrix=None, with_array=True, **parts):
    """As spatialdata_io.visium writes: pixels, a coordinate system of the dataset's name, the lattice turned."""
    from spatialdata.models import Image2DModel, ShapesModel
    from spatialdata.transformations import Identity, Scale

    array_row, array_col, um = hexagons(9, 8)
    turn = np.array([[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]) @ np.diag([-1, 1]) / UM_PER_PX
    pixels = um @ turn.T + 3000
    order = np.arange(len(um)) if order is None else order
    systems = {"slide": Identity(), "slide_downscaled_hires": Scale([0.1, 0.1], ("x", "y"))}
    shapes = ShapesModel.parse(
        pixels, geometry=0, radius=65 / UM_PER_PX / 2, index=np.arange(len(um)), transformations=systems
    )
    counts = np.arange(len(um) * 2, dtype=np.float32).reshape(-1, 2) if matrix is None else matrix
    obs = {"array_row": array_row[order], "array_col": array_col[order]} if with_array else {}
    counts_table = table(sp.csr_matrix(counts[order]), "slide", order, obs, **parts)
    image = np.zeros((3, 600, 600), np.uint8)
    full = Image2DModel.parse(image, dims="cyx", transformations={"slide": Scale([10, 10], ("x", "y"))})
    low = Image2DModel.parse(
        image[:, ::4, ::4], dims="cyx", transformations={"slide": Scale([40, 40], ("x", "y"))}
    )
    sdata = spatialdata.SpatialData(
        images={"slide_lowres_image": low, "slide_full_image": full},
        shapes={"slide": shapes},
        tables={"table": counts_table},
    )
    with catalogue.quiet():
        sdata.write(tmp_path / "slide.zarr")
    return open_section(tmp_path / "slide.zarr"), pixels * UM_PER_PX, counts


def ours(tmp_path):
    """As prepare writes: um, global, every element."""
    import geopandas as gpd
    from shapely import Point, box
    from spatialdata.models import Image2DModel, Labels2DModel, ShapesModel
    from spatialdata.transformations import Affine, Identity, Scale, Sequence, Translation

    def at(scale):
        steps = [Scale([scale, scale], ("x", "y")), Translation([100, 200], ("x", "y"))]
        return {"global": Sequence(steps)}

    mirrored = Affine([[-0.5, 0, 220], [0, 0.5, 190], [0, 0, 1]], ("x", "y"), ("x", "y"))
    he = Image2DModel.parse(
        np.full((3, 480, 260), 90, np.uint8),
        dims="cyx",
        scale_factors=[2],
        transformations={"global": mirrored},
    )
    hr = Image2DModel.parse(HR, dims="cyx", c_coords=["A", "B", "C"], transformations=at(10.0))
    mask = np.zeros((40, 20), np.int32)
    mask[10:, :] = 1
    tissue = Labels2DModel.parse(mask, dims=("y", "x"), transformations=at(5.0))
    squares = gpd.GeoDataFrame(
        geometry=[box(100, 200, 200, 300), box(100, 300, 200, 400)], index=["s0", "s1"]
    )
    spots = ShapesModel.parse(squares, transformations={"global": Identity()})
    points = gpd.GeoDataFrame(
        {"radius": [4.0, 5.0]}, geometry=[Point(110, 210), Point(150, 390)], index=["c1", "c2"]
    )
    cells = ShapesModel.parse(points, transformations={"global": Identity()})
    spot_counts = np.stack([HR[:, :10].sum((1, 2)), HR[:, 10:].sum((1, 2))]).astype(np.float32)
    sdata = spatialdata.SpatialData(
        images={"he": he, "hr_10um": hr},
        labels={"tissue": tissue},
        shapes={"spots": spots, "cells": cells},
        tables={
            "spots_table": table(sp.csr_matrix(spot_counts), "spots", ["s0", "s1"], genes=["A", "B", "C"]),
            "cells_table": table(
                np.eye(2, 3, dtype=np.float32), "cells", ["c2", "c1"], genes=["A", "B", "C"]
            ),
        },
    )
    path = publishing.create(
        tmp_path / "ours.zarr", sdata, {name: {"command": "prepare"} for name in ("he", "spots")}
    )
    return open_section(path)


# ----------------------------------------------------------------------------------------------- other's stores


def test_pixels_become_um_by_the_lattice(tmp_path):
    section, um, counts = visium_like(tmp_path)
    assert section.frame.name == "slide"
    assert section.frame.um_per_unit == pytest.approx(UM_PER_PX, rel=1e-9)
    spots = section.spots
    assert np.allclose(spots.centres_um, um)
    assert (spots.shape, spots.size_um) == ("disc", 55.0)  # not the 65 um given in the file
    assert spots.pitch_um == pytest.approx(100)
    assert np.array_equal(spots.counts.toarray(), counts)


def test_lattice_is_seen_without_array_columns(tmp_path):
    section, um, _ = visium_like(tmp_path, with_array=False)
    assert section.frame.um_per_unit == pytest.approx(UM_PER_PX, rel=1e-9)
    assert np.allclose(section.spots.centres_um, um)


def test_counts_follow_the_instance_key_not_the_row(tmp_path):
    order = np.random.default_rng(0).permutation(72)
    section, um, counts = visium_like(tmp_path, order=order)
    assert np.allclose(section.spots.centres_um, um[order])
    assert np.array_equal(section.spots.counts.toarray(), counts[order])


def test_finest_image_of_the_frame_is_the_he(tmp_path):
    section, _, _ = visium_like(tmp_path)
    assert section.image.um_per_px == pytest.approx(10 * UM_PER_PX)


def test_raw_counts_are_found_or_asked_for(tmp_path):
    logs = np.full((72, 2), 0.5, np.float32)
    whole = sp.csr_matrix(np.full((72, 2), 3.0, np.float32))
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    section, _, _ = visium_like(tmp_path / "a", matrix=logs, layers={"counts": whole})
    assert (section.spots.counts.toarray() == 3).all()
    section, _, _ = visium_like(tmp_path / "b", matrix=logs)
    with pytest.raises(StsrError, match="raw counts"):
        _ = section.spots


def test_square_arrays_tell_no_um():
    row, column = np.indices((5, 5)).reshape(2, -1)
    assert discovery.lattice_um(np.stack([column, row], 1) * 200.0, row, column) is None


def test_xenium_elements_tell_the_pixel_size(tmp_path):
    import geopandas as gpd
    from shapely import Point
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Scale

    cells = gpd.GeoDataFrame(
        {"radius": [4.0, 5.0]}, geometry=[Point(10, 20), Point(30, 40)], index=["a", "b"]
    )
    to_px = Scale([1 / 0.2125, 1 / 0.2125], ("x", "y"))
    shapes = {"cell_circles": ShapesModel.parse(cells, transformations={"global": to_px})}
    counts = table(np.eye(2, dtype=np.float32), "cell_circles", ["b", "a"])
    with catalogue.quiet():
        spatialdata.SpatialData(shapes=shapes, tables={"table": counts}).write(tmp_path / "x.zarr")
    section = open_section(tmp_path / "x.zarr")
    assert section.frame.um_per_unit == pytest.approx(0.2125)
    assert np.allclose(section.cells.centres_um, [[30, 40], [10, 20]])  # um, in the table's order
    assert list(section.cells.outlines["radius"]) == pytest.approx([5.0, 4.0])
    assert section.spots is None


def test_unknown_units_are_refused_with_a_remedy(tmp_path):
    from spatialdata.models import Image2DModel

    with catalogue.quiet():
        image = Image2DModel.parse(np.zeros((3, 8, 8), np.uint8), dims="cyx")
        spatialdata.SpatialData(images={"photo": image}).write(tmp_path / "x.zarr")
    with pytest.raises(StsrError, match="um-per-px"):
        _ = open_section(tmp_path / "x.zarr").frame
    assert open_section(tmp_path / "x.zarr", um_per_unit=2.0).image.um_per_px == 2.0


def test_map_in_a_pixel_store_lies_on_the_tissue(tmp_path):
    from spatialdata.transformations import get_transformation

    section, um, _ = visium_like(tmp_path)
    grid = section.grid(10.0)
    reach = section.spots.size_um / 2
    assert np.all(um - reach >= [grid.bounds_um[:2]]) and np.all(um + reach <= [grid.bounds_um[2:]])
    with MapWriter(section.path, ["superres_x10"], ["G0"], grid):
        pass
    again = open_section(section.path)
    image = again.sdata.images["superres_x10"]
    matrix = get_transformation(discovery.finest(image), "slide").to_affine_matrix(("x", "y"), ("x", "y"))
    assert np.allclose(matrix @ [0, 0, 1], [grid.x0_um / UM_PER_PX, grid.y0_um / UM_PER_PX, 1])
    assert again.map("superres_x10").read().shape == (1, *grid.shape)
    got = again.map("superres_x10").grid
    assert got.bin_um == 10.0 and np.allclose(got.bounds_um, grid.bounds_um)


# --------------------------------------------------------------------------------------------------- our stores


def test_own_section(tmp_path):
    section = ours(tmp_path)
    assert (section.frame.name, section.frame.um_per_unit) == ("global", 1.0)
    assert section.hr.grid == Grid(100.0, 200.0, 10.0, 20, 10)
    assert section.hr.genes == ["A", "B", "C"]
    assert section.extent_um == (100.0, 200.0, 200.0, 400.0)
    assert section.grid(5.0) == Grid(100.0, 200.0, 5.0, 40, 20)
    assert section.image.covered(section.hr.grid).all() and section.image_overlap == 1.0
    assert (section.image.read(section.hr.grid) == 90).all()
    assert np.array_equal(section.tissue.read(section.hr.grid), np.indices((20, 10))[0] >= 5)
    assert np.allclose(section.cells.centres_um, [[150, 390], [110, 210]])
    assert list(section.cells.counts.obs["id"]) == ["c2", "c1"]


def test_cells_are_areas_and_can_be_chosen(tmp_path):
    cells = ours(tmp_path).cells  # circles
    areas = [each.area for each in cells.polygons]
    assert areas == pytest.approx(np.pi * np.array([25, 16])) and list(cells.outlines.index) == ["c2", "c1"]
    for chosen in (cells.take(np.array([1])), cells.take(np.array([False, True]))):
        assert (len(chosen), chosen.ids.tolist(), chosen.element) == (1, ["c1"], "cells")
        assert np.array_equal(chosen.counts.X, cells.counts.X[1:]) and chosen.centres_um.tolist() == [
            [110, 210]
        ]


def test_spots_are_the_maps_added_up(tmp_path):
    section = ours(tmp_path)
    assert (section.spots.shape, section.spots.size_um) == ("square", 100.0)
    measured = section.spots.measurement(section.hr.grid).add_up(section.hr.read().astype(float))
    assert np.allclose(measured, section.spots.counts.toarray())
    chosen = section.spots.select(["C", "nobody", "A"]).toarray()
    assert (
        np.array_equal(chosen[:, [0, 2]], section.spots.counts.toarray()[:, [2, 0]])
        and not chosen[:, 1].any()
    )


def test_windows_of_maps(tmp_path):
    hr = ours(tmp_path).hr
    assert np.array_equal(hr.read(["C", "A"]), HR[[2, 0]])
    window = hr.grid.window(-2, 8, 5, 6)  # sticks out above and to the right
    got = hr.read(["B"], window)
    assert np.array_equal(got[0, 2:, :2], HR[1, :3, 8:]) and not got[0, :2].any() and not got[0, :, 2:].any()
    assert not hr.read(None, hr.grid.window(50, 50, 2, 2)).any()
    assert hr.read([]).shape == (0, 20, 10)
    with pytest.raises(UsageError, match="no gene"):
        hr.read(["Z"])
    with pytest.raises(ValueError, match="coincide"):
        hr.read(None, Grid(103.0, 200.0, 10.0, 2, 2))


def test_description_is_json_and_stdout_stays_clean(tmp_path, capsys):
    section = ours(tmp_path)
    described = json.loads(json.dumps(section.describe()))
    assert described["spots"]["number"] == 2 and described["hr"]["counts"] == HR.sum()
    assert described["image"]["um_per_px"] == 0.5 and described["provenance"]["he"]["origin"] == "measured"
    assert capsys.readouterr().out == ""


def test_metadata_is_read_once(tmp_path, monkeypatch):
    path, read, load = ours(tmp_path).path, [], catalogue.load_json
    monkeypatch.setattr(catalogue, "load_json", lambda file: read.append(file) or load(file))
    section = open_section(path)
    for _ in range(2):
        section.map("hr_10um")
        assert section.spots and section.image and section.tissue and section.cells
        section.describe()
    read.remove(path / "zarr.json")  # by open_section, which checks that there is a store
    of_elements = [path / group / "zarr.json" for group in ("images/he", "images/hr_10um", "labels/tissue")]
    assert sorted(read) == sorted([path / "zarr.json", *of_elements])


def test_a_section_is_a_snapshot(tmp_path):
    section = ours(tmp_path)
    before = section.elements, section.provenance
    with MapWriter(section.path, ["superres_x10"], ["A"], section.grid(10.0)) as writer:
        writer.write("superres_x10", slice(0, 1), slice(0, 20), slice(0, 10), np.ones((1, 20, 10)))
    assert (section.elements, section.provenance) == before and "superres_x10" not in section.elements
    again = open_section(section.path)
    assert again.catalogue.newest_superres() == "superres_x10" and "superres_x10" in again.provenance


def test_missing_parts_are_none_and_missing_maps_errors(tmp_path):
    section, _, _ = visium_like(tmp_path)
    assert section.hr is None and section.tissue is None and section.cells is None
    with pytest.raises(UsageError, match="no map"):
        section.map("superres_x10")
    with pytest.raises(StsrError, match="stsr prepare"):
        open_section(tmp_path / "nowhere.zarr")


def test_broken_store_is_one_sentence(tmp_path):
    section, _, _ = visium_like(tmp_path)
    (section.path / "shapes" / "slide" / "shapes.parquet").unlink()
    with pytest.raises(StsrError, match="cannot be read") as caught:
        _ = open_section(section.path).spots
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- real data


@pytest.mark.real
def test_store_by_spatialdata_io_visium(real_data, tmp_path):
    import h5py
    import spatialdata_io

    folder = real_data / "breast" / "visium"
    with catalogue.quiet():
        sdata = spatialdata_io.visium(folder, dataset_id="sample", fullres_image_file="he_fullres.tif")
        sdata.write(tmp_path / "sample.zarr")
    section = open_section(tmp_path / "sample.zarr")
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        total = float(file["matrix/data"][()].sum())
    assert section.spots.counts.shape == (493, 18085)
    assert float(section.spots.counts.sum(dtype=np.float64)) == total
    assert section.frame.um_per_unit == pytest.approx(2.0, rel=0.01)  # as its README says
    assert section.spots.size_um == 55.0 and section.image_overlap == 1.0
    grid = section.grid(10.0)
    assert section.spots.measurement(grid).bins_seen == pytest.approx(np.pi * 27.5**2 / 100, rel=0.02)
    # Spots were laid on tissue, so the image is darker under them than the slide is.
    rgb = section.image.read(Grid.covering(section.extent_um, 10.0))
    assert 120 < rgb.mean() < 245
    with MapWriter(section.path, ["superres_x10"], section.spots.genes[:20], grid) as writer:
        writer.write("superres_x10", slice(0, 20), slice(0, 220), slice(0, 220), np.ones((20, *grid.shape)))
    with catalogue.quiet():
        read = spatialdata.read_zarr(section.path)
    assert list(read.images["superres_x10"].coords["c"].values) == section.spots.genes[:20]
