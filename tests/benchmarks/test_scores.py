"""Scores of the benchmarks against closed forms and hand-made cases."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from stsr.geometry.grid import Grid
from stsr.geometry.measurement import Measurement

# Benchmarks are scripts and no package: the module is loaded from its file.
_SPEC = importlib.util.spec_from_file_location("scores", Path(__file__).parent / "scores.py")
scores = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(scores)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def test_spots_added_up():
    grid = Grid(0, 0, 10, 20, 20)
    measurement = Measurement.squares(grid)  # four spots
    maps = np.ones((2, 20, 20))
    counts = np.array([[100, 50], [100, 50], [100, 50], [100, 50.0]])
    assert scores.spots_error(maps, measurement, counts) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize("samples", [8, 39])
def test_intervals_cover_what_they_say(rng, samples):
    draws = rng.normal(size=(samples + 1, 1, 150, 150))
    expected = 0.9 if samples >= 19 else (samples - 1) / (samples + 1)
    assert scores.coverage(draws[1:], draws[0])[0] == pytest.approx(expected, abs=0.01)


def test_coverage_of_counts_needs_counting_noise(rng):
    samples = np.full((39, 1, 100, 100), 4.0)
    counts = rng.poisson(4.0, (1, 100, 100))
    assert scores.coverage(samples, counts)[0] < 0.3
    assert scores.coverage(samples, counts, counting=rng)[0] > 0.88


def test_crps_of_a_normal_is_its_closed_form_for_any_number_of_samples(rng):
    truth = np.zeros((1, 200, 200))
    exact = (np.sqrt(2) - 1) / np.sqrt(np.pi)  # standard normal against its own centre
    for count in (2, 5, 20):
        assert scores.crps(rng.normal(size=(count, 1, 200, 200)), truth)[0] == pytest.approx(exact, abs=0.01)


def test_crps_by_hand():
    samples = np.array([1.0, 4.0]).reshape(2, 1, 1, 1)
    assert scores.crps(samples, np.full((1, 1, 1), 2.0)) == pytest.approx([(1 + 2) / 2 - 3 / 2])
    assert scores.crps(samples[:1], np.full((1, 1, 1), 2.0)) == pytest.approx([1.0])
