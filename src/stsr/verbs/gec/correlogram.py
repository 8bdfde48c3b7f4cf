"""Correlation of genes by distance, and p-values corrected for spatial autocorrelation.

Means over all pairs of places at an offset are cross-correlations of rasters, computed by FFT, divided by the number of
such pairs, so gaps in the tissue need no filling. Offsets are then binned by distance, in rings one bin wide.
"""

from __future__ import annotations

import numpy as np
from scipy import fft, stats

_LEAST_OVERLAP = 0.5  # of the tissue, for a shift to be used
_LEAST_EFFECTIVE = 3.0  # places; with fewer no test is possible


class Correlogram:
    """Correlation over pairs of places, by their distance.

    Parameters
    ----------
    number
        (y, x) number of places in each bin: 1 in tissue for bins, the number of cells for cells.
    bin_um
        Side of a bin, um.

    Attributes
    ----------
    lags_um
        (k,) distance of each class of pairs, ascending; 0 is a place with itself.
    pairs
        (k,) number of ordered pairs in each class; they add up to the square of the number of places.
    """

    def __init__(self, number: np.ndarray, bin_um: float):
        number = np.asarray(number, np.float64)
        self._shape = [fft.next_fast_len(2 * size - 1, real=True) for size in number.shape]
        self.places = int(number.sum())
        self._bin_um = bin_um
        offsets = [fft.fftfreq(size, 1 / size) for size in self._shape]
        distance = np.hypot(offsets[0][:, None], offsets[1][None, :])  # bins
        self._ring = np.rint(distance).astype(np.int64)
        self._number = self._spectrum(number)
        self._overlap = np.rint(self._correlate(self._number, self._number))
        pairs = self._classes(self._overlap, self.places)
        self._kept = pairs > 0
        self.pairs = pairs[self._kept]
        # Other places in the same bin are half a bin away.
        steps = np.append([0, 0.5], np.arange(1, len(pairs) - 1))
        self.lags_um = steps[self._kept] * bin_um

    def auto(self, rasters: np.ndarray) -> np.ndarray:
        """Autocorrelation (g, k) of genes by distance; rasters (g, y, x) as for `cross`."""
        return np.stack([self._curve(spectrum, spectrum, 1.0) for spectrum in map(self._spectrum, rasters)])

    def cross(self, a: np.ndarray, b: np.ndarray, r: float) -> np.ndarray:
        """Cross-correlation (k,) of two genes by distance, in all directions.

        Parameters
        ----------
        a, b
            (y, x) sums over the places of each bin of the standardised values (mean 0, length 1 over all places).
        r
            Their correlation over places: the first value of the curve.
        """
        return self._curve(self._spectrum(a), self._spectrum(b), r)

    def moran(self, auto: np.ndarray) -> np.ndarray:
        """Moran's I (g,) of genes from their autocorrelations (g, k): binary weights, all neighbouring bins alike.

        Neighbours of a place are the others in its bin and those in the eight bins around it. NaN if none has any.
        """
        near = (self.lags_um > 0) & (self.lags_um <= self._bin_um)
        pairs = self.pairs[near]
        return auto[:, near] @ pairs / pairs.sum() if near.any() else np.full(len(auto), np.nan)

    def _curve(self, a: np.ndarray, b: np.ndarray, r: float) -> np.ndarray:
        # Values have length 1, so sums over pairs are means times pairs / places.
        return self._classes(self._correlate(a, b), r)[self._kept] * self.places / self.pairs

    def _classes(self, sums: np.ndarray, itself: float) -> np.ndarray:
        """Sums per offset (Y, X) -> per class: a place with itself, others in its bin, rings one bin wide."""
        rings = np.bincount(self._ring.ravel(), sums.ravel())
        return np.concatenate([[itself, rings[0] - itself], rings[1:]])

    def shift_test(self, a: np.ndarray, b: np.ndarray) -> float:
        """Two-sided p-value: the fraction of shifts at which two genes correlate at least as strongly.

        One gene is shifted over the other by every offset at which at least half of the tissue overlaps. The statistic
        is Pearson's correlation in the overlap (Padfield 2012, IEEE Trans. Image Process. 21:2706) times the square
        root of the number of overlapping bins. This is the random shift test with variance correction (Mrkvicka et al.
        2021, doi:10.1016/j.spasta.2020.100430), with all shifts instead of random ones. Shifting preserves the
        autocorrelation of each gene. Only for rasters with at most one place per bin.

        Parameters
        ----------
        a, b
            (y, x) as for `cross`.
        """
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        m, a1, a2, b1, b2 = self._number, *(self._spectrum(raster) for raster in (a, a * a, b, b * b))
        allowed = self._overlap >= _LEAST_OVERLAP * self.places
        bins = self._overlap[allowed]
        sum_a, sum_b = self._correlate(a1, m)[allowed], self._correlate(m, b1)[allowed]
        covariance = self._correlate(a1, b1)[allowed] - sum_a * sum_b / bins
        variance_a = self._correlate(a2, m)[allowed] - sum_a**2 / bins
        variance_b = self._correlate(m, b2)[allowed] - sum_b**2 / bins
        scale = np.sqrt(np.maximum(variance_a * variance_b, 0))
        r = np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 1e-12)
        strength = np.abs(r) * np.sqrt(bins)  # the first offset is 0
        return float(np.mean(strength >= strength[0] * (1 - 1e-9)))

    def _spectrum(self, raster: np.ndarray) -> np.ndarray:
        return fft.rfft2(raster, self._shape)

    def _correlate(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """``sum_x a(x) b(x + h)`` for every offset h (Y, X), from spectra."""
        return fft.irfft2(np.conj(a) * b, self._shape)


def effective_places(auto_a: np.ndarray, auto_b: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Effective number of independent places for the correlation of two autocorrelated genes.

    ``M = 1 + 1 / var(r)``, ``var(r) = sum_k N_k C_a(k) C_b(k) / n^2`` (Clifford, Richardson and Hemon 1989,
    Biometrics 45:123), with the sample autocorrelations C, as in Dutilleul (1993, Biometrics 49:305).

    Parameters
    ----------
    auto_a, auto_b
        Autocorrelations (a, k) and (b, k) by distance, of `Correlogram.auto`.
    pairs
        N (k,) number of ordered pairs in each class.

    Returns
    -------
    effective
        (a, b), from 2 to the number of places n.
    """
    places = np.sqrt(pairs.sum())
    variance = (auto_a * pairs) @ auto_b.T / places**2
    return 1 + 1 / np.clip(variance, 1 / (places - 1), 1)


def modified_t_test(r: np.ndarray, effective: np.ndarray) -> np.ndarray:
    """Two-sided p-values of correlations, corrected for spatial autocorrelation: Student's t, M - 2 degrees of freedom.

    M is the effective number of places. p is 1 if M is below three.
    """
    freedom = np.maximum(effective, _LEAST_EFFECTIVE) - 2
    left = np.maximum(1 - np.square(r, dtype=np.float64), 1e-12)
    p = 2 * stats.t.sf(np.abs(r) * np.sqrt(freedom / left), freedom)
    return np.where(effective < _LEAST_EFFECTIVE, 1.0, p)
