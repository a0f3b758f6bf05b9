"""Pyro programs as particle methods see them: sites, schedules, states, and what a method is."""

from ppl_diffusion.programs.bound import Bound as Bound
from ppl_diffusion.programs.method import METHODS as METHODS
from ppl_diffusion.programs.method import Method as Method
from ppl_diffusion.programs.method import Needs as Needs
from ppl_diffusion.programs.method import methods as methods
from ppl_diffusion.programs.method import register as register
from ppl_diffusion.programs.reading import Program as Program
from ppl_diffusion.programs.schedule import Item as Item
from ppl_diffusion.programs.sources import ChainSource as ChainSource
from ppl_diffusion.programs.sources import ProgramSource as ProgramSource
from ppl_diffusion.programs.sources import State as State
