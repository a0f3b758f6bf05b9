"""ArviZ data, Pareto k-hat, plots and a report of a particle posterior."""

from ppl_diffusion.diagnostics._arviz import to_arviz as to_arviz
from ppl_diffusion.diagnostics._khat import khat as khat
