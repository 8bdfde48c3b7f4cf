"""Tissue with known truth, and the vendor folders it can be written as: for demo, tests and benchmarks."""

from stsr.data.simulate.histology import image_frame, render_he
from stsr.data.simulate.stream import write_transcripts
from stsr.data.simulate.tissue import Tissue, Transcripts, simulate_tissue
from stsr.data.simulate.visium import write_visium
from stsr.data.simulate.xenium import write_xenium

__all__ = [
    "Tissue",
    "Transcripts",
    "image_frame",
    "render_he",
    "simulate_tissue",
    "write_transcripts",
    "write_visium",
    "write_xenium",
]
