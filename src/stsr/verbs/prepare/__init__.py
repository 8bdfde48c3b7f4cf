"""``stsr prepare``."""
