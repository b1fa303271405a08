"""Pictures of saved results: each function reads JSON, so a report can be drawn again, and raises InputError for a path
that cannot be written."""

from expertshare.lab.plots.bench import plot_bench, plot_parts, plot_scaling
from expertshare.lab.plots.blocks import plot_growth, plot_steps, plot_weight_against_loss
from expertshare.lab.plots.quality import common_labels, plot_block_lengths, plot_comparison, plot_p_sweep, plot_tuning
from expertshare.lab.plots.style import check_plot_path

__all__ = [
    "check_plot_path",
    "common_labels",
    "plot_bench",
    "plot_block_lengths",
    "plot_comparison",
    "plot_growth",
    "plot_p_sweep",
    "plot_parts",
    "plot_scaling",
    "plot_steps",
    "plot_tuning",
    "plot_weight_against_loss",
]
