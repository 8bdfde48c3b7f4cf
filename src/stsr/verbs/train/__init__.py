"""``stsr train``: train a method on sections with counts per bin."""
