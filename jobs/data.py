"""`altiplano data prepare` as a Ray job: python jobs/data.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("data", "prepare")
