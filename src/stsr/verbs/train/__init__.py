"""``stsr train``."""
