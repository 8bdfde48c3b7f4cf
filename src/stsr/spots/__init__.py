"""Models of measured spot counts that need no image: noise, denoising, kriging. Only numpy and scipy."""
