"""The H&E image: pixels in um, image files, tissue."""
