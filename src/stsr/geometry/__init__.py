"""Geometry: grid, lattice, measurement and outlines; all arithmetic between um and bins. No input or output."""
