"""The picture of the autoscaling scenario."""

from pathlib import Path

import load


def plot_scaling(
    phases: list[tuple[float, float]], replicas: list[tuple[float, int]], file: Path
) -> None:
    """Requests asked per second and running replicas over time, as PNG.

    Args:
        phases: (seconds, requests per second).
        replicas: (seconds from the start, running).
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    moments = load.schedule(phases)
    figure, asked = plt.subplots(figsize=(8, 3.2), layout="constrained")
    bins = range(int(replicas[-1][0]) + 2)
    asked.hist(moments, bins=list(bins), color="tab:blue", alpha=0.35)
    asked.set(xlabel="seconds", ylabel="requests per second")
    running = asked.twinx()
    running.step(*zip(*replicas, strict=True), where="post", color="tab:red")
    running.set(ylabel="replicas running", ylim=(0, max(n for _, n in replicas) + 0.5))
    running.yaxis.get_major_locator().set_params(integer=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
