"""`altiplano run` as a Ray job: python jobs/pipeline.py CONFIG [section.key=value ...]."""

from _start import start

if __name__ == "__main__":
    start("run")
