"""What measured counts say before any image: noise, denoising, kriging. numpy and scipy only."""
