"""Stages: each reads artifacts and a section of the config, and writes one artifact."""
