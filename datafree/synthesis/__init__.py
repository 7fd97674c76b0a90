"""Sources of images (phase 1) by name, with what the options need to know of each, without importing torch."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from datafree.errors import InputError
from datafree.plugins import is_custom, load_custom


@dataclass(frozen=True)
class Traits:
    """What a source is. An option that only sources with other traits read is refused as having no effect.

    synthesises: optimises images under the terms of the objective; False for a control such as noise, for which
    collapse warnings are disabled too. keeps_pool: the images of a round enter a pool. has_generator: images are the
    output of a generator. has_rounds: a round optimises a batch, or several in turn, from an initialisation of its own.
    has_noisy_layer: the generator's input is not a latent of each image but an embedding of its class, through a layer
    of random weights.
    """

    synthesises: bool = True
    keeps_pool: bool = True
    has_generator: bool = True
    has_rounds: bool = True
    has_noisy_layer: bool = False


CONTROL = Traits(synthesises=False, keeps_pool=False, has_generator=False, has_rounds=False)


class Source(NamedTuple):
    """Where a source's class is, as ``module:class``, and its traits."""

    path: str
    traits: Traits


SOURCES = {
    "inversion": Source("datafree.synthesis.inversion:InversionSynthesis", Traits()),
    "pixels": Source("datafree.synthesis.inversion:PixelSynthesis", Traits(has_generator=False)),
    "noisy_layer": Source("datafree.synthesis.noisy_layer:NoisyLayerSynthesis", Traits(has_noisy_layer=True)),
    "generator": Source(
        "datafree.synthesis.generative:GenerativeSynthesis", Traits(keeps_pool=False, has_rounds=False)
    ),
    "noise": Source("datafree.synthesis.controls:NoiseSource", CONTROL),
    "real": Source("datafree.synthesis.controls:RealSource", CONTROL),
    "folder": Source("datafree.synthesis.controls:FolderSource", replace(CONTROL, keeps_pool=True)),
}


def traits_of(source: str) -> Traits:
    """The traits of a source by name; of a user-defined class, its attribute ``traits``, or CONTROL if ``control``."""
    if not is_custom(source):
        return SOURCES[source].traits
    made_by = load_custom(source)
    if getattr(made_by, "control", False):  # the attribute of earlier versions
        return replace(Traits(), synthesises=False)
    traits = getattr(made_by, "traits", Traits())
    if not isinstance(traits, Traits):
        raise InputError(f"the traits of {source} are {traits!r}; they must be a datafree.synthesis.Traits")
    return traits


class SourcesWithout:
    """The names of all sources that lack a trait, as a container: ``"noise" in SourcesWithout("keeps_pool")``."""

    def __init__(self, trait: str):
        self.trait = trait

    def __contains__(self, source: str) -> bool:
        return not getattr(traits_of(source), self.trait)


class SourcesWith(SourcesWithout):
    """The names of all sources that have a trait, as a container."""

    def __contains__(self, source: str) -> bool:
        return not super().__contains__(source)
