# SPDX-License-Identifier: Apache-2.0
"""Draw the losses of a SAPD training around the iteration where levels become soft.

    python docs/figures/sapd_switch.py output/metrics.json projects/SAPD/switch.png --switch 400

Medians of twenty iterations, as they are logged every ten; nothing else is smoothed.
"""

import argparse

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from d2_decouple.visualization.curves import read_metrics

LOSSES = {"loss_cls": ("class loss", "#d55e00"), "loss_box_reg": ("box loss", "#0072b2")}
POSITIVES = {"num_positives_per_image": ("cells that learn an object, each image", "#009e73")}
AROUND = 200  # iterations on both sides


def main() -> None:
    """Read the command line, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("metrics", help="metrics.json of a training")
    parser.add_argument("output", help="PNG to write")
    parser.add_argument("--switch", type=int, required=True, help="iteration of the switch")
    arguments = parser.parse_args()
    metrics = read_metrics(arguments.metrics)
    figure = Figure(figsize=(8, 4.6), dpi=110, layout="constrained")
    panels = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    for axes, names in zip(panels, (LOSSES, POSITIVES), strict=True):
        for name, (label, color) in names.items():
            series = metrics[name]
            near = np.abs(series[:, 0] - arguments.switch) <= AROUND
            axes.plot(*series[near].T, color=color, marker=".", label=label)
        axes.axvline(arguments.switch, color="#444444", linestyle="--", linewidth=1)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left" if names is POSITIVES else "upper right")
    panels[0].set(ylabel="loss")
    panels[0].set_title(f"levels are soft from iteration {arguments.switch} on", fontsize=10)
    panels[1].set(xlabel="iteration", ylim=(0, None))
    FigureCanvasAgg(figure).print_png(arguments.output)


if __name__ == "__main__":
    main()
