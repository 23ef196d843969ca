"""Preview: what a model will see, for people."""
