"""How: fork server, worker, NVML, sampling, phases, simulation, environment."""
