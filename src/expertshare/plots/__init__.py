"""Pictures of saved results: each function reads JSON, so a report can be drawn again."""

from expertshare.plots.bench import plot_bench
from expertshare.plots.blocks import plot_growth, plot_steps, plot_weight_against_loss
from expertshare.plots.comparison import plot_comparison
from expertshare.plots.parts import plot_parts
from expertshare.plots.scaling import plot_scaling
from expertshare.plots.style import check_plot_path
from expertshare.plots.sweeps import common_labels, plot_block_lengths, plot_p_sweep
from expertshare.plots.tuning import plot_tuning

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
