"""How far true expression may lie from a map, on every scale: fitted, stated as a spread, and drawn as samples."""
