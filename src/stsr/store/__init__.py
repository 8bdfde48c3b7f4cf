"""The section store: what is in it, reading it, and writing to it safely."""
