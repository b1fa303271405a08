"""Pictures of saved results: each function reads JSON, so a report can be drawn again."""

from expertshare.plots.bench import plot_bench
from expertshare.plots.comparison import plot_comparison
from expertshare.plots.scaling import plot_scaling
from expertshare.plots.style import check_plot_path
from expertshare.plots.tuning import plot_tuning

__all__ = ["check_plot_path", "plot_bench", "plot_comparison", "plot_scaling", "plot_tuning"]
