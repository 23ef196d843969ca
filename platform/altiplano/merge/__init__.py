"""Adapters into one model: checked before, folded file by file, compared after."""
