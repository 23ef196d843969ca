"""What a model can do, measured on data no stage was trained on."""
