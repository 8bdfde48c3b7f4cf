"""Patch features of a section's H&E: files, computation by an encoder, and the cache in the section."""
