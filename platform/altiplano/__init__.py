"""Altiplano: teach a LLaMA-type model a new language on one Ray cluster, and serve it.

The package is a house of seven floors (docs/design.md); a module imports only from floors below
its own. Importing this package costs nothing: torch, ray and vllm are imported where used.
"""

__version__ = "0.1.0"
