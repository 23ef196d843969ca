"""`altiplano pretrain` as a Ray job: python jobs/pretrain.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("pretrain")
