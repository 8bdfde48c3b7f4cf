"""Building blocks of networks, independent of diffusion and of the data."""
