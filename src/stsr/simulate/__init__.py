"""Simulate tissue with known truth and write it as a vendor's folder, for the demo, tests and benchmarks."""

from stsr.simulate.histology import image_frame, render_he
from stsr.simulate.tissue import Tissue, Transcripts, simulate_tissue
from stsr.simulate.visium import write_visium
from stsr.simulate.visium_hd import write_visium_hd
from stsr.simulate.xenium import write_xenium

__all__ = [
    "Tissue",
    "Transcripts",
    "image_frame",
    "render_he",
    "simulate_tissue",
    "write_visium",
    "write_visium_hd",
    "write_xenium",
]
