"""Runs with user-defined learners and sources: their options, their mistakes, and what a resume checks of them."""

import json
import shutil
from functools import partial
from pathlib import Path

import custom
import nets
import pytest
import torch
import yaml
from conftest import call, rows

import datafree_kd

SCALED, GREY = custom.name("Scaled"), custom.name("Grey")


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def options_of(folder):
    return summary_of(folder)["options"]


def test_a_user_defined_learner_trains_the_student(distil):
    [row] = rows(distil("--epochs", 1, "--learner", custom.name("Averaged")))
    assert row["student/ce"] > 0 and row["average"] > 0 and "student/kd" not in row
    assert row["lr"] == 0 and row["images"] == 32


def test_the_options_of_a_learner_reach_it(distil):
    words = ("--epochs", 1, "--learner", SCALED)
    straight, scaled = distil(*words, tag="straight"), distil(*words, "--factor", 0, tag="scaled")
    assert options_of(straight)["factor"] == 1 and options_of(scaled)["factor"] == 0
    plain = rows(distil("--epochs", 1, tag="plain"))[0]
    assert {k: v for k, v in rows(straight)[0].items() if k != "student/scaled"} == plain
    assert rows(scaled)[0]["acc1"] != plain["acc1"]  # a loss of 0 trains nothing


def test_the_options_of_a_source_reach_it(distil):
    words = ("--epochs", 1, "--source", GREY)
    folder = distil(*words, "--level", 0.25, "--polarity", "negative")
    [row] = rows(folder)
    assert row["images/near_duplicates"] == 1 and row["images"] == 96
    options = options_of(folder)
    assert (options["level"], options["polarity"], options["dither"]) == (0.25, "negative", None)
    # Its traits tell that it has no generator; what else it reads cannot be known.
    assert "nz" not in options and "tv" in options


def test_options_are_inherited_with_their_section(distil):
    folder = distil("--epochs", 1, "--source", custom.name("Darker"), "--level", 0.25)
    assert yaml.safe_load((folder / "config.yaml").read_text())["grey"]["level"] == 0.25
    assert options_of(folder)["level"] == 0.25


def test_the_configuration_left_repeats_a_run_with_user_defined_classes(distil):
    folder = distil("--epochs", 1, "--source", GREY, "--level", 0.25, "--learner", SCALED, "--factor", 0.5)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["grey"]["level"] == 0.25 and written["scaled"] == {"factor": 0.5}
    call(datafree_kd, "--config", folder / "config.yaml", "--log_tag", "again")
    again = folder.with_name("again")
    assert rows(again) == rows(folder) and options_of(again) == options_of(folder)


def test_print_config_reads_back_with_user_defined_options(distil, capsys, tmp_path):
    distil("--source", GREY, "--level", 0.25, "--learner", SCALED, "--print_config")
    text = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(text)
    call(datafree_kd, "--config", tmp_path / "printed.yaml", "--print_config")
    assert capsys.readouterr().out == text
    assert yaml.safe_load(text)["grey"] == {"level": 0.25, "polarity": "positive", "dither": None}


@pytest.mark.parametrize(
    "before, after, named",
    [
        (("--source", GREY), ("--source", GREY, "--level", 0.25), "--level"),
        (("--source", GREY, "--dither", 0.5), ("--source", GREY), "--dither"),
        (("--learner", SCALED), ("--learner", SCALED, "--factor", 0.5), "--factor"),
        (("--learner", SCALED), (), "--learner"),
        (("--learner", custom.name("Averaged")), (), "--learner"),
        ((), ("--learner", SCALED), "--learner"),
    ],
)
def test_user_defined_options_count_at_resume(before, after, named, distil, refused):
    folder = distil("--epochs", 1, *before)
    last = folder / "checkpoints" / "last.pth"
    line = refused(partial(distil, tag="other"), "--epochs", 2, "--resume", last, *after)
    assert named in line and "last.pth" in line
    assert len(rows(distil("--epochs", 2, "--resume", "auto", *before))) == 2 == len(rows(folder))


def copies(tmp_path, *places):
    """Copies of custom.py -> their paths."""
    for place in places:
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copy(custom.__file__, tmp_path / place)
    return [tmp_path / place for place in places]


@pytest.mark.parametrize("option, name", [("learner", "Scaled"), ("source", "Grey"), ("method", "Grey")])
def test_code_counts_at_resume_by_its_content_and_not_by_its_place(option, name, distil, refused, tmp_path):
    first, second = copies(tmp_path, "a/mine.py", "b/mine.py")
    folder = distil("--epochs", 1, f"--{option}", f"{first}:{name}")
    digest = options_of(folder)[option]
    assert str(tmp_path) not in digest and name in digest
    first.unlink()
    resumed = (f"--{option}", f"{second}:{name}", "--resume", "auto")
    assert distil("--epochs", 2, *resumed) == folder and len(rows(folder)) == 2
    assert options_of(folder)[option] == digest
    second.write_text(second.read_text() + "\n# another state of it\n")
    assert f"the code of mine-{name} has changed" in refused(distil, "--epochs", 3, *resumed)


@pytest.mark.parametrize(
    "name, parts",
    [
        (custom.name("Grey"), ("Grey is not a subclass of Learner",)),
        (nets.name("Nothing"), ("Nothing", "subclass of Learner")),
        (custom.name("Failing"), ("Failing could not be constructed: ZeroDivisionError: no total (line ", "custom.py")),
        (nets.name("tiny"), ("nets.py:tiny could not be constructed: TypeError",)),
        (custom.name("Missing"), ("has no function or class 'Missing'",)),
        ("nowhere.py:Learner", ("there is no file 'nowhere.py'", "check the path")),
    ],
)
def test_a_learner_that_cannot_be_used(name, parts, distil, refused, tmp_path):
    line = refused(distil, "--learner", name)
    assert all(part in line for part in parts)
    assert not (tmp_path / "runs").exists()


def test_a_file_of_a_learner_that_cannot_be_imported(distil, refused, tmp_path):
    broken = Path(tmp_path / "broken.py")
    for code, error in (("import no_such_module", "ModuleNotFoundError"), ("1 +", "SyntaxError"), ("exit()", "Exit")):
        broken.write_text(code)
        line = refused(distil, "--learner", f"{broken}:Learner")
        assert "broken.py' cannot be imported" in line and error in line
    assert "distill, or path/to/file.py:Class" in refused(distil, "--learner", "distil", code=2)


# ---------------------------------------------------------------- mistakes in classes of one's own making

MISTAKES = """
import torch
from dataclasses import dataclass
from typing import Optional
from datafree.config import option
from datafree.learners.base import Learner, cosine_to_zero, make_optimizer
from datafree.learners.distill import DistillLearner
from datafree.synthesis.base import BaseSynthesis
from datafree.synthesis.optimised import RoundSynthesis
from datafree.terms import Term


class Plain(Learner):
    def __init__(self, student, teacher, augment, config, total_steps):
        optimizer = make_optimizer([student], config.optim)
        super().__init__(student, optimizer, cosine_to_zero(optimizer, total_steps), config.run.precision)


class WithoutTerms(Plain):
    def loss(self, batch, progress):
        return self.network(batch.images).sum()


class Floats(Plain):
    def loss(self, batch, progress):
        return self.network(batch.images).sum(), {"sum": 1.0}


class Detached(Plain):
    def loss(self, batch, progress):
        return self.network(batch.images).sum().detach(), {}


class WithoutSuper(Learner):
    def __init__(self, **parts):
        pass


class Twice(DistillLearner):
    def all_terms(self):
        return [*super().all_terms(), Term("kd", 1.0, self._kd, ("logits",), ("logits",))]


class Misspelt(DistillLearner):
    def all_terms(self):
        return [*super().all_terms(), Term("extra", 1.0, self._kd, ("logit",), ("logits",))]


class Text(DistillLearner):
    def all_terms(self):
        return [*super().all_terms(), Term("extra", 1.0, self._kd, "logits", ("logits",))]


class NoBegin(RoundSynthesis):
    pass


class OneOptimiser(RoundSynthesis):
    def _begin_round(self, targets):
        pixels = torch.rand(len(targets), *self.pool.shape, requires_grad=True)
        return lambda: pixels, torch.optim.Adam([pixels])


class Bright(OneOptimiser):
    def _begin_round(self, targets):
        render, optimizer = super()._begin_round(targets)
        return lambda: 3 * render(), [optimizer]


class Constant(OneOptimiser):
    def _begin_round(self, targets):
        render, optimizer = super()._begin_round(targets)
        return lambda: render().detach(), [optimizer]


class Odd(BaseSynthesis):
    @dataclass
    class Options:
        table: bytes = option(b'', "No option can be this.")


"""


@pytest.mark.parametrize(
    "option, name, parts",
    [
        ("learner", "Plain", ("Plain has no method loss",)),
        ("learner", "WithoutTerms", ("WithoutTerms.loss returned Tensor", "(loss, terms)")),
        ("learner", "Floats", ("Floats.loss returned", "scalar tensor")),
        ("learner", "Detached", ("does not depend on anything that is trained",)),
        ("learner", "WithoutSuper", ("WithoutSuper must call super().__init__",)),
        ("learner", "Twice", ("two terms of the loss are called kd",)),
        ("learner", "Misspelt", ("the term extra reads ('logit',)", "logits, embed")),
        ("learner", "Text", ("the term extra reads 'logits'", "tuple")),
        ("method", "Plain", ("Plain is not a subclass of BaseSynthesis",)),
        ("method", "NoBegin", ("NoBegin has no method _begin_round",)),
        ("method", "OneOptimiser", ("_begin_round returned tuple", "list of torch optimisers")),
        ("method", "Bright", ("images from", "must be in [0, 1]")),
        ("method", "Constant", ("does not depend on anything that is trained",)),
        ("method", "Odd", ("Odd.Options: table must be a bool, int",)),
        ("learner", "", ("names no object",)),
    ],
)
def test_a_mistake_in_a_user_defined_class_is_one_sentence(option, name, parts, distil, refused, tmp_path):
    (tmp_path / "mine.py").write_text(MISTAKES)
    method = {"method": f"{tmp_path / 'mine.py'}:{name}"} if option == "method" else {}
    words = ("--oh", 1, "--g_steps", 2) if method else ("--learner", f"{tmp_path / 'mine.py'}:{name}")
    codes = {"Odd": 2}
    line = refused(partial(distil, **method), *words, code=codes.get(name, 1), before_run=False)
    assert all(part in line for part in parts), line


def test_a_learner_that_does_not_read_the_options_of_distillation_refuses_them(distil, refused):
    averaged = custom.name("Averaged")
    for words in (("--T", 5), ("--kd", 3), ("--cd_loss", 1), ("--striplet", 1), ("--view_cache", 5)):
        line = refused(distil, "--learner", averaged, *words, code=2)
        assert f"{words[0]} has no effect because" in line and "learner is" in line
    folder = distil("--epochs", 1, "--learner", averaged)
    assert (
        not {"T", "kd", "cd_loss", "striplet"} & options_of(folder).keys() and "custom-Averaged" in folder.parent.name
    )
    assert f"Learner: {averaged}." in (folder / "log.txt").read_text()


TRAINED = """
from torch import nn
from datafree.learners.distill import DistillLearner
from datafree.terms import Term


class Headed(DistillLearner):
    def trained_modules(self):
        return {**super().trained_modules(), "head": nn.Linear(self.network.num_classes, self.teacher.num_classes)}

    def all_terms(self):
        return [*super().all_terms(), Term("head", 0.5, self._head, ("logits",), ("logits",))]

    def _head(self, teacher, student):
        return (self.modules["head"](student.logits.float()) - teacher.logits).square().mean()
"""


def test_a_learner_may_train_a_module_beside_the_student(distil, tmp_path):
    (tmp_path / "mine.py").write_text(TRAINED)
    folder = distil("--epochs", 2, "--learner", f"{tmp_path / 'mine.py'}:Headed")
    state = torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["learner"]
    assert {"head", "projection"} <= state.keys()
    assert len(rows(distil("--epochs", 3, "--learner", f"{tmp_path / 'mine.py'}:Headed", "--resume", "auto"))) == 3


CONTROL = """
import torch
from datafree.synthesis.base import BaseSynthesis


class Old(BaseSynthesis):
    control = True  # as earlier versions had it

    def __init__(self, card, device, **parts):  # without the constructor of its base class
        self.level = 0.5

    def sample(self, n):
        return torch.full((n, *self.card.shape), self.level, device=self.device), None
"""


def test_a_source_of_an_earlier_version_may_be_a_control_and_not_call_its_base_class(distil, tmp_path):
    (tmp_path / "mine.py").write_text(CONTROL)
    folder = distil("--epochs", 1, method=f"{tmp_path / 'mine.py'}:Old")
    assert "[Alarm]" not in (folder / "log.txt").read_text()
