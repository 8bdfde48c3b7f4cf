"""``stsr gec``."""
