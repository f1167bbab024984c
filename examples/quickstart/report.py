"""Makes what the quickstart shows at its end: perplexities, loss curves and samples."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from topk_megatron.files import read_scalars


@dataclass(frozen=True)
class Model:
    """One trained model.

    Attributes:
        name: ``topk`` or ``dense``.
        directory: The folder of its checkpoints, logs and TensorBoard events.
        seconds: Wall time of its training process; None if an earlier run trained it.
    """

    name: str
    directory: Path
    seconds: float | None

    def scalars(self, tag: str) -> dict[int, float]:
        """Return the logged values by iteration."""
        return read_scalars(self.directory / "tensorboard", tag)

    def validation_loss(self) -> float:
        """Return the loss on held-out plays after the last step, in nats per token."""
        losses = self.scalars("lm loss validation")
        return losses[max(losses)]


def compare(models: list[Model], samples: dict[str, str], prompt: str) -> str:
    """Return the table of both models, with a sample of each below it."""
    rows = ["", "== both models on held-out plays, after the same training tokens", ""]
    rows.append(f"{'model':<8}{'validation loss':>18}{'perplexity':>14}{'ms/step':>12}{'s':>8}")
    for model in models:
        loss = model.validation_loss()
        times = model.scalars("iteration-time")
        milliseconds = 1e3 * statistics.median(times.values()) if times else math.nan
        rows.append(
            f"{model.name:<8}{loss:>18.4f}{math.exp(loss):>14.2f}{milliseconds:>12.0f}"
            f"{'-' if model.seconds is None else format(model.seconds, '.0f'):>8}"
        )
    for model in models:
        rows += ["", f"-- {model.name} continues {prompt.strip()!r}:", samples[model.name].strip()]
    return "\n".join(rows)


def plot_losses(models: list[Model], path: Path) -> Path:
    """Draw the training and validation losses of both models to a PNG; return its path."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150)
    for model, colour in zip(models, ("#d95f02", "#1f4e79"), strict=True):
        losses = model.scalars("lm loss")
        axes.plot(list(losses), list(losses.values()), color=colour, lw=1.2, label=model.name)
        final = model.validation_loss()
        axes.plot(
            max(losses), final, "o", color=colour, label=f"{model.name}, held out: {final:.3f}"
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("TopK language model and its dense twin on Shakespeare")
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
    return path
