"""A real pipeline from a case: architectures, weights, optimizations. Torch is imported here, and only when used."""
