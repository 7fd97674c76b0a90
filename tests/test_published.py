"""The published settings that the method files and defaults state: a number that moves has to move here, too."""

import pytest
from conftest import ROOT

import registry
from datafree import cli, config

CMI_SCRIPTS = "CMI's repository (zju-vipa/CMI), its scripts for CIFAR-10, WRN-40-2 > WRN-16-1"
PUBLISHED = {
    "rgal": (
        "RGAL's released code (Sharpiless/RGAL) for CIFAR",
        "epochs 200, ep_steps 400, kd_steps 400, g_steps 400, synthesis_batch_size 256, lr_g 0.001, nz 256, ngf 64,"
        " bn 1, oh 1, adv 1, triplet 0.1, striplet 0.1, start_layer 2, end_layer 4, margin 0.2, batch_size 128,"
        " lr 0.1, momentum 0.9, weight_decay 0.0001, T 20, cd_loss 0.1, gram_loss 0, adv_T 1",
    ),
    "cmi": (
        CMI_SCRIPTS + ", from scratch",
        "epochs 200, ep_steps 400, kd_steps 400, g_steps 200, synthesis_batch_size 256, lr_g 0.001, bn 1, oh 1,"
        " adv 0.5, cr 0.8, cr_T 0.1, batch_size 128, lr 0.1, T 20",
    ),
    "fast": (
        "Fast's repository (zju-vipa/Fast-Datafree), WRN-40-2, 10 steps",
        "epochs 220, warmup 20, g_steps 10, lr_g 0.002, lr_z 0.01, bn 10, bn_momentum 0.9, oh 0.4, adv 1.1,"
        " reset_epoch 139, lr 0.2, batch_size 256, T 20",
    ),
    "nayer": (
        "NAYER's repository (tmtuan1307/NAYER), its README's command for CIFAR-100, WRN-40-2 > WRN-16-2, 120 epochs",
        "epochs 120, warmup 20, g_steps 40, round_batches 2, warmup_batches 10, generator_life 10, lr_g 0.004, bn 10,"
        " oh 0.5, adv 1.33, synthesis_batch_size 400, batch_size 512, lr 0.2, T 20",
    ),
    "dafl": (
        "Chen et al., ICCV 2019, as in " + CMI_SCRIPTS,
        "g_steps 1, kd_steps 5, synthesis_batch_size 256, nz 512, oh 1, act 0.001, balance 20, lr_g 0.001, lr 0.1,"
        " T 20, bn 0, adv 0",
    ),
    "dfq": (
        "Choi et al., CVPRW 2020, as in " + CMI_SCRIPTS,
        "g_steps 1, kd_steps 10, bn 1, oh 1, balance 20, adv 1, act 0, lr_g 0.001, lr 0.1, T 20",
    ),
    "zskt": (
        "Micaelli and Storkey, NeurIPS 2019, as in " + CMI_SCRIPTS,
        "g_steps 1, kd_steps 5, adv 1, bn 0, oh 0, lr_g 0.001, lr 0.1, T 20",
    ),
    "deepinv": (
        "Yin et al., CVPR 2020: tv 0.001 of images of deviation 0.25; the rest as in " + CMI_SCRIPTS,
        "g_steps 1000, lr_g 0.1, bn 10, oh 1, tv 0.004, adv 1, adv_T 3, l2 0, batch_size 256, lr 0.1, T 20",
    ),
}
CHOICES = {
    "rgal": "relation paper, sampling focal, sampling_space embedding, triplet_target student, "
    " striplet_feature global, striplet_sampling distance, keep best, generator_init random, bn_reduction norm,"
    " adv_distance kl, adv_where agree",
    "rgal_release": "relation release, sampling_space logits, sampling focal, sampling_dim nominal",
    "fast": "generator_init maml",
    "nayer": "source noisy_layer, oh_target target, adv_where agree",
    "dafl": "source generator, oh_target predicted, flip off",
    "dfq": "source generator, oh_target predicted, adv_where all",
    "zskt": "source generator, adv_distance kl, adv_where all",
    "dfad": "source generator, adv_distance l1, kd_distance l1, adv_where all",
    "deepinv": "source pixels, adv_distance js, adv_where all",
    "cmi": "source inversion, adv_where agree",
}


QUANTIZATION = {
    "gdfq": (
        "Xu et al., ECCV 2020, settings for CIFAR (the project's notes of its repository)",
        "synthesis_batch_size 200, batch_size 200, ep_steps 200, g_steps 1, kd_steps 1, warmup 4, oh 1, bn 0.1, T 20,"
        " ce 1, lr 0.0001, momentum 0.9, weight_decay 0.0001, lr_g 0.001, range_momentum 0.9, triplet 0, striplet 0,"
        " adv 0",
    ),
    "rgal": (
        "RGAL's released code: 0.1 beside oh 1 and, in training, beside a divergence of weight 1, which is 0.1 here",
        "triplet 0.1, striplet 0.01, oh 1, bn 0.1, T 20, ce 1, adv 0",
    ),
}
QUANTIZATION_CHOICES = {
    "gdfq": "source generator, bn_reduction mse, ranges ema, w_per channel",
    "rgal": "relation paper, sampling focal, sampling_space embedding, triplet_target student, striplet_feature global",
    "pixels": "source pixels",
}


@pytest.mark.parametrize("method", QUANTIZATION)
def test_the_numbers_of_a_quantization_are_those_of_its_source(method):
    source, text = QUANTIZATION[method]
    found = options_of(method, config.QuantizeConfig, registry.QUANTIZATION_METHODS)
    assert_numbers(found, text, source)
    assert found["kd"] is None and found["nesterov"] and not found["w_symmetric"] and not found["fold_bn"]


@pytest.mark.parametrize("method", QUANTIZATION_CHOICES)
def test_the_choices_of_a_quantization_are_those_of_its_source(method):
    found = options_of(method, config.QuantizeConfig, registry.QUANTIZATION_METHODS)
    assert_choices(found, QUANTIZATION_CHOICES[method])


# Hosts of incremental learning, CIFAR-100 in ten tasks.
INCREMENTAL = {
    "abd": (
        "ABD's code (GT-RIPL/AlwaysBeDreaming-DFCIL), experiments/cifar100-tentask.sh: 250 epochs of batch 128,"
        " wd 0.0002, mu 0.1, 10000 steps of the generator, deep_inv_params 1e-3 5e1 1e-3 1e3 1",
        "epochs 250, batch_size 128, replay_batch_size 128, g_steps 10000, synthesis_rounds 1, lr_g 0.001, nz 1000,"
        " oh 1, oh_T 1000, balance 1, bn 50, tv 0.001, lce 1, fkd 0.1, hkd 0, rkd 0, kd 0, lr 0.1, weight_decay 0.0002,"
        " triplet 0, striplet 0",
    ),
    "rdfcil": (
        "R-DFCIL's code (gqk/R-DFCIL), config/cifar100.yaml: 200 epochs, the last 40 for the head, 5000 of inversion",
        "epochs 200, head_share 0.2, batch_size 128, replay_batch_size 128, g_steps 5000, synthesis_rounds 1,"
        " lr_g 0.001, oh 1, oh_T 1000, balance 1, bn 50, tv 0.001, lce 0.5, hce 0.5, hkd 0.15, rkd 0.5, fkd 0, kd 0,"
        " lr 0.1, weight_decay 0.0005, triplet 0, striplet 0",
    ),
}
INCREMENTAL_CHOICES = {
    "abd": "learner replay, source generator, oh_target predicted, bn_reduction gaussian, scale share, passes together",
    "rdfcil": "learner replay, source generator, oh_target predicted, bn_reduction gaussian, scale adaptive,"
    " passes apart",
    "rgal": "learner replay, source inversion, relation paper, triplet_target teacher, sampling_space embedding",
    "abd_inversion": "learner replay, source inversion, oh_target target, bn_reduction norm, scale share",
    "lwf": "learner lwf",
    "finetune": "learner finetune",
    "joint": "learner joint",
    "fetril": "learner fetril",
}


def options_of(method, config_class=config.DistillConfig, method_files=registry.METHODS):
    given = cli.parse(config_class, ["--method", method], description="", method_files=method_files)[0]
    return {
        name: value for part in vars(given).values() if hasattr(part, "__dict__") for name, value in vars(part).items()
    }


def pairs(text):
    return [pair.split() for pair in text.replace("\n", " ").split(",")]


def assert_numbers(found, text, source):
    stated = {name: float(value) for name, value in pairs(text)}
    assert {name: float(found[name]) for name in stated} == stated, source


def assert_choices(found, text):
    stated = dict(pairs(text))
    assert {name: found[name] for name in stated} == stated


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_numbers_of_a_method_are_those_of_its_source(method):
    source, text = PUBLISHED[method]
    assert_numbers(options_of(method), text, source)


@pytest.mark.parametrize("method", CHOICES)
def test_the_choices_of_a_method_are_those_of_its_source(method):
    assert_choices(options_of(method), CHOICES[method])


@pytest.mark.parametrize("method", INCREMENTAL)
def test_the_numbers_of_an_incremental_host_are_those_of_its_source(method):
    source, text = INCREMENTAL[method]
    found = options_of(method, config.IncrementalConfig, registry.INCREMENTAL_METHODS)
    assert_numbers(found, text, source)


@pytest.mark.parametrize("method", registry.INCREMENTAL_METHODS)
def test_the_choices_of_an_incremental_method_are_those_of_its_source(method):
    found = options_of(method, config.IncrementalConfig, registry.INCREMENTAL_METHODS)
    assert_choices(found, INCREMENTAL_CHOICES[method])


def test_every_method_file_is_compared_with_its_source_or_is_ours():
    ours = {"rgal_fast", "rgal_reptile", "noise", "real", "folder"}  # our recipes, and what synthesises nothing
    assert set(PUBLISHED) | set(CHOICES) | ours == set(registry.METHODS) and (ROOT / "configs" / "methods").is_dir()


def test_the_defaults_of_the_relation_section():
    """Margin and stages of the released code; the paper's focal sampling in the space of the embedding."""
    r = config.Relation()
    assert (r.margin, r.start_layer, r.end_layer, r.triplet, r.striplet) == (0.2, 2, 4, 0.0, 0.0)
    assert (r.relation, r.sampling, r.sampling_space, r.striplet_sampling) == (
        "paper",
        "focal",
        "embedding",
        "distance",
    )
    assert (r.triplet_target, r.striplet_feature) == ("student", "global")
