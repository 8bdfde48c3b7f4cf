"""``stsr singlecell``."""
