"""`altiplano extend` as a Ray job: python jobs/extend.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("extend")
