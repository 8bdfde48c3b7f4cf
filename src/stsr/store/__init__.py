"""The section store: catalogue, reading and safe writing."""
