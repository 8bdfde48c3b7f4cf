"""``stsr prepare``: convert an instrument's output to a section store."""
