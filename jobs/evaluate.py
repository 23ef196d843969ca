"""`altiplano evaluate` as a Ray job: python jobs/evaluate.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("evaluate")
