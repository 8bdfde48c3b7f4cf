"""``stsr superres``."""
