"""The typed config tree and its loader: what one YAML may say, and what it resolves to."""

from altiplano.config.loader import Project, load_config, load_serve_only
from altiplano.config.schema import Config, ServeOnly

__all__ = ["Config", "Project", "ServeOnly", "load_config", "load_serve_only"]
