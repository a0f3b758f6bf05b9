"""The shipped families keep the laws of model programs, and a family that breaks one is caught."""

import pytest

from ppl_diffusion.distributions import ReverseChain
from ppl_diffusion.kernels import Cosine
from ppl_diffusion.models import MaskedDiffusion, UniformDiffusion, load
from ppl_diffusion.models.program import FAMILIES
from ppl_diffusion.testing import ModelContract

SHAPE = {"dim": 8, "depth": 1, "heads": 2, "dropout": 0.0}


class TestMasked(ModelContract):
    def make_model(self):
        return MaskedDiffusion.build("abc", 2, **SHAPE)


class TestUniform(ModelContract):
    def make_model(self):
        return UniformDiffusion.build("abc", 2, **SHAPE, time_conditioning=True)


class TestMaskedOnAnotherSchedule(ModelContract):
    def make_model(self):
        network = MaskedDiffusion.build("ab", 3, **SHAPE).denoiser
        return MaskedDiffusion(network, vocabulary="ab", length=3, schedule=Cosine())


@pytest.fixture(autouse=True)
def _families_of_a_test():
    known = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(known)


def half_a_bound(self, *args, **options):
    return 0.5 * MaskedDiffusion.bound_terms(self, *args, **options)


def no_gradient(self, *args, **options):
    return MaskedDiffusion.loss(self, *args, **options).detach().requires_grad_()


def backwards(self, ids):
    return MaskedDiffusion.decode(self, ids.flip(-1))


def renamed(self):
    return MaskedDiffusion.settings(self) | {"name": self.name + "'"}


def fresh_network(cls, directory, **settings):
    return cls.build(settings["vocabulary"], settings["length"], name=settings["name"], **SHAPE)


def too_short(self, kernel, prompt=None):
    return ReverseChain(kernel, self.length - 1, prompt=prompt)


LAWS = [
    ("the_bound_lies_above_the_code_length", {"bound_terms": half_a_bound}),
    ("the_loss_is_finite_and_trains", {"loss": no_gradient}),
    ("encode_and_decode_invert_each_other", {"decode": backwards}),
    ("what_is_saved_comes_back", {"settings": renamed}),
    ("what_is_saved_comes_back", {"restore": classmethod(fresh_network)}),
    ("samples_are_clean_sequences", {"around": too_short}),
]


@pytest.mark.parametrize(("law", "changes"), LAWS)
def test_a_family_that_breaks_a_law_is_caught(law, changes, tmp_path):
    class Contract(ModelContract):
        def make_model(self):
            return type("Mutant", (MaskedDiffusion,), changes).build("abc", 2, **SHAPE)

    contract = Contract()
    model = Contract._model.__wrapped__(contract)
    folder = (tmp_path,) if "saved" in law else ()
    with pytest.raises(AssertionError):
        getattr(contract, f"test_{law}")(model, *folder)


def test_a_family_that_overrides_nothing_passes(tmp_path):
    """The mutants above fail for what they changed."""

    class Contract(ModelContract):
        def make_model(self):
            return type("Plain", (MaskedDiffusion,), {}).build("abc", 2, **SHAPE)

    contract = Contract()
    for law in dict(LAWS):
        model = Contract._model.__wrapped__(contract)
        getattr(contract, f"test_{law}")(model, *((tmp_path,) if "saved" in law else ()))


def test_two_families_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"the family 'masked' is taken by .*MaskedDiffusion; cho"):
        type("Other", (MaskedDiffusion,), {"family": "masked"})


def test_a_class_without_a_name_is_a_family_by_its_own():
    plain = type("Plain", (MaskedDiffusion,), {})
    assert (plain.family, FAMILIES["Plain"]) == ("Plain", plain)
    assert FAMILIES["masked"] is MaskedDiffusion
    type("Plain", (MaskedDiffusion,), {})  # again, as a notebook does: no complaint


def test_a_schedule_that_was_not_imported_is_named(tmp_path):
    program = TestMaskedOnAnotherSchedule().make_model()
    program.save(tmp_path)
    file = tmp_path / "program.json"
    file.write_text(file.read_text().replace("Cosine", "Sawtooth"))
    with pytest.raises(ValueError, match=r"the schedule 'Sawtooth', none of .*Cosine.*; import"):
        load(tmp_path)


def test_entries_that_a_family_does_not_take_are_one_sentence(tmp_path):
    TestMasked().make_model().save(tmp_path)
    file = tmp_path / "program.json"
    file.write_text(file.read_text().replace('"name"', '"odd": 1, "name"'))
    with pytest.raises(ValueError, match=r"describes no prior: .*'odd'; restore it"):
        load(tmp_path)
