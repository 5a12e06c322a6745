"""What to run: models, sweeps and cases, as data and ids. Knows neither torch nor pytest."""
