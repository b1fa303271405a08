"""Pictures of saved results: each function reads JSON, so a report can be drawn again."""

from expertshare.lab.plots.bench import plot_bench
from expertshare.lab.plots.blocks import plot_growth, plot_steps, plot_weight_against_loss
from expertshare.lab.plots.comparison import plot_comparison
from expertshare.lab.plots.parts import plot_parts
from expertshare.lab.plots.scaling import plot_scaling
from expertshare.lab.plots.style import check_plot_path
from expertshare.lab.plots.sweeps import common_labels, plot_block_lengths, plot_p_sweep
from expertshare.lab.plots.tuning import plot_tuning

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
