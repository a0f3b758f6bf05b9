"""Exact oracles and contract tests, shipped so that other people's rooms can inherit them.

A new kernel, denoiser, resampler, distribution, potential or model program is checked by a class::

    class TestMyResampler(ResamplerContract):
        def make_resampler(self):
            return MyResampler()

Call ``pytest.register_assert_rewrite("ppl_diffusion.testing")`` in your ``conftest.py`` for
readable failures. Needs pytest and SciPy; nothing outside ``testing`` imports it.
"""

from ppl_diffusion.testing.denoiser_contract import DenoiserContract as DenoiserContract
from ppl_diffusion.testing.dense import all_states as all_states
from ppl_diffusion.testing.dense import forward_law as forward_law
from ppl_diffusion.testing.dense import posterior_as_cavity as posterior_as_cavity
from ppl_diffusion.testing.dense import prior_law as prior_law
from ppl_diffusion.testing.dense import site_rows as site_rows
from ppl_diffusion.testing.dense import state_index as state_index
from ppl_diffusion.testing.dense import state_matrix as state_matrix
from ppl_diffusion.testing.devices import DeviceDiscipline as DeviceDiscipline
from ppl_diffusion.testing.distribution_contract import DistributionContract as DistributionContract
from ppl_diffusion.testing.kernel_contract import KernelContract as KernelContract
from ppl_diffusion.testing.model_contract import ModelContract as ModelContract
from ppl_diffusion.testing.oracles import ExactChain as ExactChain
from ppl_diffusion.testing.oracles import chi_square_p_value as chi_square_p_value
from ppl_diffusion.testing.oracles import total_variation as total_variation
from ppl_diffusion.testing.oracles import z_score as z_score
from ppl_diffusion.testing.path_laws import PathLaw as PathLaw
from ppl_diffusion.testing.potential_contract import PotentialContract as PotentialContract
from ppl_diffusion.testing.resampler_contract import ResamplerContract as ResamplerContract
from ppl_diffusion.testing.toys import PROCESSES as PROCESSES
from ppl_diffusion.testing.toys import CountingDenoiser as CountingDenoiser
from ppl_diffusion.testing.toys import counted as counted
from ppl_diffusion.testing.toys import random_joint as random_joint
from ppl_diffusion.testing.toys import toy_chain as toy_chain
from ppl_diffusion.testing.toys import toy_markov_chain as toy_markov_chain
from ppl_diffusion.testing.toys import toy_potential as toy_potential
from ppl_diffusion.testing.toys import toy_process as toy_process
