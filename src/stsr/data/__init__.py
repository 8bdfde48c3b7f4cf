"""Sections, grids, measurements and tiles: everything that knows where things lie."""
