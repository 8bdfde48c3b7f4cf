"""``stsr celltype``."""
