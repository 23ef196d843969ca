"""The typed config tree and its loader: what one YAML may say, and what it resolves to."""

from altiplano.config.loader import Project, load_config
from altiplano.config.schema import Config

__all__ = ["Config", "Project", "load_config"]
