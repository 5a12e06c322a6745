"""Measure what a diffusion model costs on a GPU: which card it needs, and whether a commit made it worse."""

__version__ = "0.1.0"
