"""One page from stored results: figures, tables, and the papers' claims beside what was measured."""
