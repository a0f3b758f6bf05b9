"""ArviZ data, Pareto k-hat, plots and a report of a particle posterior."""

from ppl_diffusion.diagnostics._comparison_plot import plot_comparison as plot_comparison
from ppl_diffusion.diagnostics._comparison_plot import plot_comparison_data as plot_comparison_data
from ppl_diffusion.diagnostics._plot_data import plot_ancestry_data as plot_ancestry_data
from ppl_diffusion.diagnostics._plot_data import plot_ess_data as plot_ess_data
from ppl_diffusion.diagnostics._plot_data import plot_evidence_data as plot_evidence_data
from ppl_diffusion.diagnostics._plot_data import plot_token_entropy_data as plot_token_entropy_data
from ppl_diffusion.diagnostics._plot_data import plot_weights_data as plot_weights_data
from ppl_diffusion.diagnostics.chain_report import chain_summary as chain_summary
from ppl_diffusion.diagnostics.comparison import Comparison as Comparison
from ppl_diffusion.diagnostics.comparison import Contender as Contender
from ppl_diffusion.diagnostics.comparison import compare as compare
from ppl_diffusion.diagnostics.diversity import collapse as collapse
from ppl_diffusion.diagnostics.diversity import nearest_distance as nearest_distance
from ppl_diffusion.diagnostics.diversity import order_sd as order_sd
from ppl_diffusion.diagnostics.plots import plot_ancestry as plot_ancestry
from ppl_diffusion.diagnostics.plots import plot_ess as plot_ess
from ppl_diffusion.diagnostics.plots import plot_evidence as plot_evidence
from ppl_diffusion.diagnostics.plots import plot_token_entropy as plot_token_entropy
from ppl_diffusion.diagnostics.plots import plot_weights as plot_weights
from ppl_diffusion.diagnostics.report import summary as summary
from ppl_diffusion.diagnostics.report import summary_table as summary_table
from ppl_diffusion.smc.arviz_data import to_arviz as to_arviz
from ppl_diffusion.smc.khat import khat as khat
