"""How well the ways of making maps predict spots that they have not seen."""
