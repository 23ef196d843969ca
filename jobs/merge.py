"""`altiplano merge` as a Ray job: python jobs/merge.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("merge")
