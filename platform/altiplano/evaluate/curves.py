"""Training curves as a picture: loss, learning rate and speed over steps.

Knows what the log's records mean, nothing of models. Costs the import of matplotlib.
"""

from pathlib import Path

from altiplano.errors import DataError
from altiplano.train.follow import read_log

_PANELS = (
    ("loss", "loss (nats per token)"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens per second"),
)


def plot_training(log_jsonl: Path, output_png: Path, title: str) -> None:
    """Draw a training log.

    Args:
        log_jsonl: JSON lines that training wrote (`train.follow.read_log` reads them).
        output_png: picture to write.
        title: heading.

    Raises:
        DataError: the log holds no step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_log(log_jsonl)
    if not records:
        raise DataError(f"{log_jsonl} holds no training step: the stage did not train")
    steps = [record["step"] for record in records]
    figure = Figure(figsize=(7, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    for axes, (key, label) in zip(
        figure.subplots(len(_PANELS), 1, sharex=True), _PANELS, strict=True
    ):
        axes.plot(steps, [record[key] for record in records], marker=".", linewidth=1)
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[-1].set_xlabel("step")
    figure.savefig(output_png, dpi=110)
