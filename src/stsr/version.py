"""The version, on ground that every room may stand on."""

__version__ = "0.1.0"
