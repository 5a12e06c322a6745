"""Two runs, one verdict. Knows records and cases, neither torch nor pytest."""
