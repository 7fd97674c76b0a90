"""Options from defaults, method files, YAML files and flags, and the messages about mistakes."""

from dataclasses import asdict, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import Literal, get_args, get_origin, get_type_hints

import custom
import nets
import pytest
import yaml

from datafree.cli import parse, to_yaml
from datafree.config import CONFIGS, DistillConfig, QuantizeConfig, Relation, ScratchConfig, Synthesis, option, sections
from datafree.errors import InputError, OptionError
from datafree.options import list_options, result_options

PUBLISHED = """--method rgal --dataset cifar100 --data_root images --teacher resnet34 --student resnet18
--teacher_weights t.pth --epochs 240 --kd_steps 200 --ep_steps 600 --g_steps 500 --batch_size 512
--synthesis_batch_size 300 --lr 0.2 --lr_g 1e-3 --adv 0.5 --bn 10 --oh 1.5 --act 0.1 --balance 5 --cr 0.8
--cr_T 0.3 --T 15 --triplet 0.1 --striplet 0.2 --triplet_target teacher --striplet_feature logits
--pair_sample --balanced_sampling --start_layer -2 --end_layer 5
--cd_loss 0.4 --gram_loss 0.6 --custom_steps 0.7
--save_dir out --log_tag t1 --gpu 1 --seed 7 --resume auto --print_freq 50 -j 3"""


@dataclass
class Noise:
    """Plain noise, and a heading that is far too long for one line of a terminal of eighty columns."""

    level: float = option(0.5, "How much.", low=0, high=1)
    steps: int = option(3, "How long.", flags=("-s",), low=0)
    shift: int = option(0, "Where to.")
    kind: Literal["plain", "off", "none"] = option("plain", "Which.")
    clip: bool = option(False, "Whether.")
    means: tuple[float, ...] = option((), "Per channel.")
    label: str = option("", "Free text.")


@dataclass
class Place:
    """Where."""

    device: str = option("auto", "On what.")


@dataclass
class Config:
    """Small, so that the tests do not move with the programs."""

    noise: Noise = field(default_factory=Noise)
    place: Place = field(default_factory=Place)
    method: str = option("first", "Recipe.")


def read(*argv, cls=Config, **more):
    return parse(cls, list(argv), description="A test.", **more)[0]


def refused(*argv, cls=Config, **more):
    """The message of the OptionError; it must be one line."""
    with pytest.raises(OptionError) as caught:
        read(*argv, cls=cls, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def file(tmp_path):
    """Writes a text or bytes to a new file and returns its path."""

    def write(content, name="some.yaml"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def methods(file):
    return {
        "first": file("noise: {steps: 10, level: 1e-3}\nexpect: {top1: 90}", "first.yaml"),
        "second": file("noise: {steps: 20}", "second.yaml"),
    }


def other_value(hint, spec):
    """A valid text for YAML and flags that differs from the default, and its value."""
    if hint is bool:
        return str(not spec.default).lower(), not spec.default
    if get_origin(hint) is Literal:
        names = [name for name in get_args(hint) if name != spec.default]
        name = (
            names[0] if names else "datafree.learners.distill:DistillLearner"
        )  # a choice of one, or a user-defined class
        return name, name
    if isinstance(hint, UnionType):
        hint = next(part for part in get_args(hint) if part is not NoneType)
    if hint is int:
        return str((spec.default or 0) + 3), (spec.default or 0) + 3
    if hint is float:
        if spec.metadata.get("low", 0) > 0.25:
            return "25e-1", 2.5
        return ("25e-2", 0.25) if spec.default != 0.25 else ("0.5", 0.5)
    return ("elsewhere", "elsewhere") if hint is str else ("0.25,1e-1", (0.25, 0.1))


def every_field(*classes):
    return [
        pytest.param(
            cls, name, f.name, *other_value(get_type_hints(section)[f.name], f), id=f"{cls.__name__}.{name}.{f.name}"
        )
        for cls in classes
        for name, section in sections(cls).items()
        for f in fields(section)
    ]


# With these no option is unused.
BUSY = [
    "--generator_init=reptile",
    "--bn=1",
    "--cr=1",
    "--triplet=1",
    "--striplet=1",
    "--striplet_feature=features",
    "--cd_loss=1",
    "--oh=1",
    "--adv=1",
    "--student_weights=student.pth",
]
BUSY_OF = {
    DistillConfig: BUSY,
    ScratchConfig: ["--weights=weights.pth"],
    QuantizeConfig: [word for word in BUSY if not word.startswith(("--cd_loss", "--student_weights"))],
}
BUSY_FOR = {  # options that need others than these
    "source": [],  # which may leave others unused
    "class_embedding": ["--source=generator"],
    "filter_lr": ["--optimizer=muon"],
    "class_embeddings": ["--source=noisy_layer"],
    "generator_life": ["--source=noisy_layer"],
    "warmup_batches": ["--warmup=1"],
}


@pytest.mark.parametrize(
    "cls, section, name, text, value", every_field(DistillConfig, ScratchConfig, QuantizeConfig, Config)
)
def test_every_field_is_set_alike_by_flag_dotted_flag_and_yaml(cls, section, name, text, value, file):
    busy = BUSY_FOR.get(name, BUSY_OF.get(cls, []))
    busy = [*busy, "--evaluate_only"] if (cls, name) == (QuantizeConfig, "student_weights") else busy
    before = read(*busy, cls=cls)
    expected = replace(before, **{section: replace(getattr(before, section), **{name: value})})
    assert read(*busy, f"--{name}", text, cls=cls) == expected
    assert read(*busy, f"--{name.replace('_', '-')}={text}", cls=cls) == expected
    assert read(*busy, f"--{section}.{name}", text, cls=cls) == expected
    assert read(*busy, f"--{section.replace('_', '-')}.{name.replace('_', '-')}={text}", cls=cls) == expected
    in_yaml = f"[{text}]" if isinstance(value, tuple) else text
    others = [word for word in busy if not word.startswith(f"--{name}=")]
    assert read(*others, "--config", file(f"{section}:\n  {name}: {in_yaml}\n"), cls=cls) == expected


@pytest.mark.parametrize("cls", [DistillConfig, ScratchConfig, Config])
def test_a_configuration_written_reads_back(cls, file):
    config = read(*([*BUSY, "--lr_z=0.5", "--teacher_mean=0.1,0.2"] if cls is DistillConfig else []), cls=cls)
    assert read("--config", file(to_yaml(config)), cls=cls) == config
    assert read("--config", file(to_yaml(cls())), cls=cls) == cls()


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--source noise --adv 1", ("--adv", "source is noise")),
        ("--source noise --triplet 1", ("--triplet", "source is noise")),
        ("--source real --warmup 2", ("--warmup", "source is real")),
        ("--source noise --balanced_sampling", ("--balanced_sampling", "source is noise")),
        ("--bn 1 --meta_rate 0.5", ("--meta_rate", "generator_init is random")),
        ("--cr_T 0.5", ("--cr_T", "cr is 0")),
        ("--source generator --lr_z 0.5", ("--lr_z", "source is generator")),
        ("--source generator --pool_size 500", ("--pool_size", "source is generator")),
        ("--source generator --synthesis_rounds 3", ("--synthesis_rounds", "source is generator")),
        ("--source noise --synthesis_rounds 3", ("--synthesis_rounds", "source is noise")),
        ("--source generator --view_cache 500", ("--view_cache", "source is generator")),
        ("--source pixels --ngf 8", ("--ngf", "source is pixels")),
        ("--source pixels --generator_init maml", ("--generator_init", "source is pixels")),
        ("--adv 1 --adv_distance l1 --adv_T 2", ("--adv_T", "adv_distance is l1")),
        ("--kd_distance l1 --T 4", ("--T", "kd_distance is l1")),
        ("--bn_momentum 0.9", ("--bn_momentum", "bn is 0")),
        ("--relation off --triplet 1", ("--triplet", "relation is off")),
        ("--sampling uniform", ("--sampling", "triplet is 0")),
        ("--triplet 0 --margin 1", ("--margin", "triplet is 0", "striplet is 0")),
        ("--relation release --striplet 1", ("--relation", "triplet is 0")),
        ("--sampling_space logits", ("--sampling_space", "triplet is 0", "striplet is 0")),
        ("--striplet 1 --start_layer 1", ("--start_layer", "triplet is 0", "striplet_feature is global")),
        ("--evaluate_only --resume auto", ("--resume", "evaluate_only is true")),
    ],
)
def test_an_option_that_nothing_reads_is_refused(words, parts):
    message = refused(*words.split(), cls=DistillConfig)
    assert all(part in message for part in parts), message


def test_an_option_that_nothing_reads_does_not_count():
    names = ("source", "triplet", "relation", "sampling", "sampling_space")

    def counted(triplet, source="inversion"):
        relation = Relation(triplet=triplet, sampling_space="logits")
        found = result_options(DistillConfig(relation=relation, synthesis=Synthesis(source=source)))
        return {name: found[name] for name in names if name in found}

    assert counted(0.0) == {"source": "inversion", "triplet": 0.0}
    every = {"relation": "paper", "sampling": "focal", "sampling_space": "logits"}
    assert counted(0.1) == {"source": "inversion", "triplet": 0.1, **every}
    assert counted(0.1, "noise") == {"source": "noise"}


def test_options_that_do_not_affect_the_result_do_not_count():
    """Where and how a run happens, and the names of files, whose contents count instead."""
    surroundings = {
        *("save_dir", "log_tag", "device", "threads", "deterministic", "resume", "evaluate_only", "print_freq"),
        *("eval_every", "grid_every", "workers", "data_root", "card", "eval", "download", "teacher_weights"),
        *("student_weights", "weights", "teacher_acc", "base_acc", "view_cache", "compile"),
        *("teacher_weights_key", "student_weights_key", "weights_key", "onnx", "on_alarm"),
        *("pool_images", "held_out", "class_embeddings"),
    }
    for cls in CONFIGS:
        options = {o.name: o for o in list_options(cls) if o.section != "call"}
        assert {name for name, o in options.items() if not o.affects_result} == surroundings & options.keys()
        assert not surroundings & result_options(cls()).keys()
    assert {"method", "seed", "precision", "dataset", "teacher", "lr", "bn"} <= result_options(DistillConfig()).keys()


@pytest.mark.parametrize("words", ["--triplet 0", "--relation off", "--source noise", "--method noise"])
def test_what_a_file_sets_may_be_switched_off_later(words, file):
    path = file("relation: {triplet: 0.3, sampling: uniform}\nsynthesis: {bn: 1}\n", "mine.yaml")
    methods = {"rgal": file("", "rgal.yaml"), "noise": file("synthesis: {source: noise}", "noise.yaml")}
    config = read("--config", path, *words.split(), cls=DistillConfig, method_files=methods)
    assert config.relation.sampling == "uniform"
    based = file("base: mine.yaml\nrelation: {triplet: 0}\n", "based.yaml")
    assert read("--config", based, cls=DistillConfig, method_files=methods).relation.triplet == 0
    silly = file("relation: {triplet: 0, sampling: uniform}\n", "silly.yaml")
    assert "silly.yaml:1" in refused("--config", silly, cls=DistillConfig, method_files=methods)


def test_an_option_that_only_repeats_what_holds_anyway_may_be_unused(file):
    assert read("--source", "noise", "--adv", "0", "--cr_T", "0.2", cls=DistillConfig).synthesis.source == "noise"
    assert (
        read("--source", f"{file('def Mine(): 0', 'mine.py')}:Mine", "--adv", "1", cls=DistillConfig).synthesis.adv == 1
    )


def test_a_file_may_be_based_on_another(file, tmp_path):
    file("noise: {steps: 30, shift: 1}", "low.yaml")
    file("noise: {steps: 40}\nbase: low.yaml", "middle.yaml")
    top = file("base: middle.yaml\nnoise: {level: 1}", "top.yaml")
    assert read("--config", top).noise == Noise(steps=40, shift=1, level=1)
    assert "base" in refused("--config", file("base: self.yaml", "self.yaml"), cls=DistillConfig)
    around = f"base: ../{tmp_path.name}/self.yaml"
    assert "base" in refused("--config", file(around, "self.yaml"), cls=DistillConfig)
    assert "nowhere.yaml" in refused("--config", file("base: nowhere.yaml", "lost.yaml"))


@pytest.mark.parametrize("cls", [DistillConfig, ScratchConfig])
def test_names_and_spellings_are_unique_in_a_program(cls):
    options = list_options(cls)
    spellings = [f"--{o.name}" for o in options] + [flag for o in options for flag in o.flags]
    spellings += [f"--no_{o.name}" for o in options if o.kind is bool]
    assert len(set(spellings)) == len(spellings)
    assert all(o.help.endswith(".") for o in options)


def test_published_flags_of_cmi_and_rgal():
    config = read(*PUBLISHED.split(), cls=DistillConfig)
    given = {
        name: value for section in sections(DistillConfig) for name, value in asdict(getattr(config, section)).items()
    }
    assert (config.method, given["device"], given["workers"]) == ("rgal", "cuda:1", 3)
    assert given["pair_sample"] is given["balanced_sampling"] is True
    assert read("--evaluate_only", "--student_weights", "s.pth", cls=DistillConfig).run.evaluate_only is True
    words = PUBLISHED.split()
    for flag, text in zip(words, words[1:]):
        name = flag.lstrip("-")
        if name in given and not text.startswith("--"):
            assert given[name] == type(given[name])(text), flag


def test_each_source_overrides_the_ones_before(file, methods):
    low = file("noise: {steps: 30, shift: 1}", "low.yaml")
    high = file("noise: {steps: 40}", "high.yaml")
    assert read().noise.steps == 3
    assert read(method_files=methods).noise == Noise(steps=10, level=1e-3)
    assert read("--config", low, method_files=methods).noise == Noise(steps=30, level=1e-3, shift=1)
    assert read("--config", low, "--config", high).noise == Noise(steps=40, shift=1)
    assert read("--config", high, f"--config={low}").noise.steps == 30
    assert read("--steps", "50", "--config", low).noise == Noise(steps=50, shift=1)
    assert read("--steps", "50", "--noise.steps", "60", "-s", "70").noise.steps == 70
    assert read("--gpu", "1", "--device", "cpu").place.device == "cpu"
    assert read("--device", "cpu", "--gpu=1").place.device == "cuda:1"


def test_the_method_is_named_by_flag_or_yaml(file, methods):
    chosen, later = file("method: second\n"), file("method: first", "later.yaml")
    for argv, method, steps in (
        (["--config", chosen], "second", 20),
        (["--method", "second"], "second", 20),
        (["--config", chosen, "--method=first"], "first", 10),
        ([], "first", 10),
        (["--config", chosen, "--config", later], "first", 10),
    ):
        config = read(*argv, method_files=methods)
        assert (config.method, config.noise.steps) == (method, steps)


def test_a_method_file_cannot_name_a_method(file):
    assert "unknown key method" in refused(method_files={"first": file("method: first")})


def test_spellings_of_booleans_tuples_and_negative_numbers(file):
    assert read("--clip").noise.clip and read("--clip", "--steps", "1").noise.clip
    for argv in (["--clip", "false"], ["--no_clip"], ["--no-clip"], ["--clip=no"], ["--clip", "--no_clip"]):
        assert read(*argv).noise.clip is False
    assert read("--no_clip", "--clip").noise.clip is True
    assert read("--means", "-.5,1e-3,2").noise.means == (-0.5, 1e-3, 2.0)
    assert read("--means", "1", "--means", "").noise.means == read("--means=").noise.means == ()
    assert read("--shift", "-2").noise.shift == read("--shift=-2").noise.shift == -2
    assert read("--label=-x=y").noise.label == "-x=y"
    assert read("--config", file("noise: {means: 0.5, shift: -2}")).noise == Noise(means=(0.5,), shift=-2)


def test_the_traps_of_yaml(file):
    def noise(text):
        return read("--config", file("noise:\n  " + text)).noise

    assert noise("level: 1e-3").level == 1e-3
    for off in ("off", "Off", "false", "no", '"off"'):
        assert noise(f"kind: {off}").kind == "off"
    for none in ("none", "None", "null", "~", '"none"', ""):
        assert noise(f"kind: {none}").kind == "none"
    for yes in ("true", "on", "yes", "True"):
        assert noise(f"clip: {yes}").clip is True
    for text in ("007", "off", "1:30", "1e3"):
        assert noise(f"label: {text}").label == text
    for text, label in (("null", ""), ("~", ""), ("", ""), ("'null'", "null")):
        assert noise(f"label: {text}").label == label


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "---\n", "noise:\n", "noise: {}\nexpect:\n", "\ufeffexpect: {a: [1]}"]
)
def test_files_that_set_nothing(content, file):
    assert read("--config", file(content)) == Config()


VALUES = [
    ("level", "2", "from 0 to 1"),
    ("level", "-0.1", "from 0 to 1"),
    ("level", "nan", "a number"),
    ("shift", "4.0", "whole number"),
    ("shift", "1.5", "whole number"),
    ("steps", "on", "whole number"),
    ("level", "true", "a number"),
    ("level", "half", "a number"),
    ("steps", "-1", "at least 0"),
    ("clip", "1", "true or false"),
    ("clip", "maybe", "true or false"),
    ("steps", "''", "whole number"),
    ("means", "0.1,x", "numbers"),
    ("means", "1,.inf", "numbers"),
    ("means", "1,inf", "numbers"),
    ("kind", "plan", "one of plain, off, none; did you mean plain?"),
    ("kind", "1", "plain, off, none"),
]


@pytest.mark.parametrize("name, text, allowed", VALUES)
def test_values_that_an_option_cannot_have(name, text, allowed, file):
    message = refused(f"--{name}={text.strip(chr(39))}")
    assert f"--{name} cannot be" in message and allowed in message
    path = file(f"\nnoise:\n  {name}: {f'[{text}]' if name == 'means' else text}\n")
    message = refused("--config", path, f"--{name}", "0")  # a mistake counts though it is overridden
    assert message.startswith(f"{path}:3: noise.{name} cannot be") and allowed in message


def test_infinite_and_empty_values():
    assert "a number" in refused("--level", "inf") and "a number" in refused("--level", "1e999")
    assert "non-empty" in refused("--device", "") and read("--label", "").noise.label == ""
    assert "at least 0" in refused("--gpu", "-1") and "whole number" in refused("--gpu", "one")


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--step", "5"], "unknown option --step; did you mean --steps?"),
        (["--noise.step", "5"], "unknown option --noise.step; did you mean --steps?"),
        (["--place.steps=5"], "unknown option --place.steps; did you mean --steps?"),
        (["-gpu", "0"], "unknown option -gpu; did you mean --gpu?"),
        (["--print-confg"], "unknown option --print-confg; did you mean --print_config?"),
        (["--no_steps"], "unknown option --no_steps; did you mean --steps?"),
        (["--zzzzzz"], "unknown option --zzzzzz; --help lists them"),
        (["--a\nb"], "unknown option --a b"),
        (["--"], "unknown option --"),
        (["--steps"], "--steps needs a value, a whole number of at least 0"),
        (["--label", "--clip"], "--label needs a value, a text"),
        (["--config"], "--config needs a value"),
        (["--no_clip=true"], "--no_clip takes no value; write --clip=true"),
        (["--no_clip", "true"], "unexpected argument 'true'"),
        (["train"], "unexpected argument 'train'"),
        (["--steps", "5", "6"], "unexpected argument '6'"),
        (["--steps=two\nlines"], r"--steps cannot be 'two\nlines'"),
    ],
)
def test_mistakes_on_the_command_line(argv, words):
    assert words in refused(*argv)


def test_the_message_of_an_unknown_method_names_the_nearest(file, methods):
    expected = "cannot be 'secnd'; it takes one of first, second; did you mean second?"
    assert refused("--method", "secnd", method_files=methods) == f"--method {expected}"
    path = file("noise:\n\nmethod: secnd")
    assert refused("--config", path, method_files=methods) == f"{path}:3: method {expected}"


@pytest.mark.parametrize(
    "content, line, words",
    [
        ("steps: 5", 1, "unknown key steps; did you mean noise: {steps: ...}?"),
        ("noise.steps: 5", 1, "unknown key noise.steps; did you mean noise: {steps: ...}?"),
        ("place: {steps: 5}", 1, "unknown key place.steps; did you mean noise: {steps: ...}?"),
        ("place:\n  method: first", 2, "unknown key place.method; did you mean method?"),
        ("noise:\n  stps: 5", 2, "unknown key noise.stps; did you mean noise: {steps: ...}?"),
        ("\nnoisy: {steps: 5}", 2, "unknown key noisy; did you mean noise?"),
        ("call: {dry_run: true}", 1, "unknown key call; --help lists them"),
        ("gpu: 1", 1, "unknown key gpu"),
        ("noise: loud", 1, "noise is a section: write noise: {NAME: VALUE}"),
        ("noise: [1]", 1, "noise is a section"),
        ("- 1", 1, "the file must hold names and values"),
        ("word", 1, "the file must hold names and values"),
        ("expect: 93", 1, "expect must hold names and values"),
        ("noise:\n  steps: 1\n  steps: 2", 3, "steps is given twice"),
        ("noise: {}\nnoise: {}", 2, "noise is given twice"),
        ("{[1]: 2}", 1, "a sequence cannot be a name"),
        ("noise: {steps: [1]}", 1, "noise.steps cannot be a sequence; it takes a whole number"),
        ("noise: {label: {a: b}}", 1, "noise.label cannot be a mapping"),
        ("noise: {means: [[1]]}", 1, "noise.means cannot be a sequence"),
        ("noise: {means: [~]}", 1, "noise.means cannot be"),
        ("noise:\n  steps: [1\nx: y: z", 3, "not valid YAML"),
        ("noise:\n\tsteps: 1", 2, "not valid YAML"),
        ("noise: *other", 1, "not valid YAML"),
        ("noise: {}\n---\nnoise: {}", 2, "not valid YAML"),
    ],
)
def test_mistakes_in_a_file(content, line, words, file):
    path = file(content)
    assert refused("--config", path).startswith(f"{path}:{line}: {words}")


def test_the_message_of_a_known_name_in_the_wrong_place_names_its_own_place_alone(file):
    path = file("g_steps: 5")
    assert refused("--config", path, cls=DistillConfig) == (
        f"{path}:1: unknown key g_steps; did you mean schedule: {{g_steps: ...}}?"
    )
    assert refused("--distill.g_steps=5", cls=DistillConfig).endswith("did you mean --g_steps?")


def test_files_that_cannot_be_read(file, tmp_path):
    assert "No such file" in refused("--config", str(tmp_path / "absent.yaml"))
    assert str(tmp_path) in refused("--config", str(tmp_path))
    for content in (b"noise: \xff", b"\xff\xfe", b"noise: \x00"):
        path = file(content)
        assert refused("--config", path).startswith(f"{path} is not a text file")
    assert "No such file" in refused(method_files={"first": tmp_path / "absent.yaml"})


def test_nothing_in_a_file_is_executed(file, tmp_path):
    trace = tmp_path / "trace"
    label = "noise: {label: !!python/object/apply:os.mkdir "
    assert read("--config", file(f"{label} '{trace}'}}")).noise.label == str(trace)
    assert "sequence" in refused("--config", file(f"{label} ['{trace}']}}"))
    assert not trace.exists()


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        DistillConfig(),
        ScratchConfig(),
        Config(noise=Noise(kind="off", level=1e-5, means=(0.5, 1e-7), clip=True), method="second"),
        *(
            Config(noise=Noise(kind="none", label=text))
            for text in ("null", "~", "off", "1e-3", "yes", " a: b # c ", "'\"", "é", "[x]", "=")
        ),
    ],
)
def test_to_yaml_reads_back(config, file):
    text = to_yaml(config)
    assert read("--config", file(text), cls=type(config)) == config
    assert set(yaml.safe_load(text)) == set(asdict(config))


def test_to_yaml_keeps_letters_readable():
    assert "label: é\n" in to_yaml(Config(noise=Noise(label="é")))


def test_to_yaml_is_complete_whatever_the_method_sets(file, methods):
    path = file(to_yaml(Config(method="second")))
    assert read("--config", path, method_files=methods) == Config(method="second")


def test_two_equal_tuples_are_written_out_twice():
    mean = (0.5, 0.25)
    config = DistillConfig()
    config.teacher.teacher_mean = config.teacher.teacher_std = mean
    assert to_yaml(config).count("[0.5, 0.25]") == 2


def test_invocation():
    def call(*argv):
        invocation = parse(Config, argv, description="")[1]
        return invocation.print_config, invocation.dry_run

    assert call() == (False, False)
    assert call("--print-config") == call("--print_config") == (True, False)
    assert call("--dry-run", "--steps", "1") == call("--dry_run") == (False, True)


def test_defaults_are_not_shared_between_calls():
    read().noise.steps = 99
    assert read().noise.steps == 3


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("cls", [DistillConfig, ScratchConfig])
def test_help_shows_every_option_with_its_sentence_choices_and_default(cls, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as caught:
        read("--nonsense", "-h", cls=cls, examples="python program.py --seed 1")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(columns, 100) or columns < 80
    flat = " ".join(text.split())
    for name, section in sections(cls).items():
        assert " ".join(f"{name}: {section.__doc__}".split()) in flat
    for opt in list_options(cls):
        assert f"--{opt.name}" in flat and f"{opt.help} (" in flat
        assert all(choice in flat for choice in opt.choices)
    assert "(one of test, none; default test)" in flat and "--weight_decay, --wd X" in flat
    assert "python program.py --seed 1" in text


def test_help_names_the_methods_and_what_the_default_one_sets(capsys, methods):
    with pytest.raises(SystemExit):
        read("--help", method_files=methods)
    flat = " ".join(capsys.readouterr().out.split())
    assert "Recipe. (one of first, second; default first)" in flat
    assert "How long. (default 3; the default method sets 10)" in flat
    assert "Whether. (default false)" in flat and "Per channel. (default empty)" in flat


# Method files with sections of other programs.


@dataclass
class Colour:
    """What only the other program has."""

    hue: float = option(0.5, "Which.", low=0, high=1)
    name: Literal["red", "blue"] = option("red", "Its name.")


@dataclass
class Other:
    """Another program with methods."""

    colour: Colour = field(default_factory=Colour)
    place: Place = field(default_factory=Place)
    method: str = option("first", "Recipe.")


PROGRAMS = (Config, Other)


def test_a_method_file_may_have_sections_of_other_programs(file):
    path = file("noise: {steps: 10}\ncolour: {hue: 0.25, name: blue}\nplace: {device: cpu}", "first.yaml")
    based = file("base: first.yaml\nnoise: {shift: 2}\ncolour: {name: red}", "second.yaml")
    given = {"method_files": {"first": path, "second": based}, "other_configs": PROGRAMS}
    assert read(**given) == Config(Noise(steps=10), Place("cpu"))
    assert read(cls=Other, **given) == Other(Colour(0.25, "blue"), Place("cpu"))
    assert read("--method", "second", **given) == Config(Noise(steps=10, shift=2), Place("cpu"), "second")
    assert read("--method", "second", cls=Other, **given) == Other(Colour(0.25, "red"), Place("cpu"), "second")
    assert "colour" not in to_yaml(read(**given))


@pytest.mark.parametrize(
    "content, line, words",
    [
        ("noise: {}\ncolour:\n  hue: 2", 3, "colour.hue cannot be '2'; it takes a number from 0 to 1"),
        ("colour: {name: rod}", 1, "colour.name cannot be 'rod'; it takes one of red, blue; did you mean red?"),
        ("colour: {hui: 0.5}", 1, "unknown key colour.hui; did you mean colour: {hue: ...}?"),
        ("colour: {steps: 5}", 1, "unknown key colour.steps"),
        ("colour: blue", 1, "colour is a section: write colour: {NAME: VALUE}"),
        ("colour: {hue: 0.1, hue: 0.2}", 1, "hue is given twice"),
        ("noise: {hue: 0.5}", 1, "unknown key noise.hue"),
        ("hue: 0.5", 1, "unknown key hue"),
        ("colours: {hue: 0.5}", 1, "unknown key colours"),
    ],
)
def test_mistakes_in_sections_of_other_programs(content, line, words, file):
    path = file(content)
    message = refused(method_files={"first": path}, other_configs=PROGRAMS)
    assert message.startswith(f"{path}:{line}: {words}")


def test_a_config_file_may_not_have_sections_of_other_programs(file, methods):
    path = file("noise: {steps: 1}\ncolour: {hue: 0.25}")
    message = refused("--config", path, method_files=methods, other_configs=PROGRAMS)
    assert message.startswith(f"{path}:2: unknown key colour")
    based = file(f"base: {path}", "based.yaml")
    assert f"{path}:2" in refused("--config", based, method_files=methods, other_configs=PROGRAMS)
    assert "unknown option --hue" in refused("--hue", "0.5", method_files=methods, other_configs=PROGRAMS)
    assert "unknown key colour" in refused(method_files={"first": path})  # no program has it


def test_a_method_file_for_every_program(file):
    path = file("synthesis: {bn: 2}\ndistill: {lr: 0.2}\ntraining: {epochs: 7, lr: 0.3}", "rgal.yaml")
    given = {"method_files": {"rgal": path}, "other_configs": CONFIGS}
    config = read(cls=DistillConfig, **given)
    assert (config.synthesis.bn, config.optim.lr, config.schedule.epochs) == (2.0, 0.2, 200)
    wrong = file("training: {epochs: 0}", "wrong.yaml")
    message = refused(cls=DistillConfig, method_files={"rgal": wrong}, other_configs=CONFIGS)
    assert message.startswith(f"{wrong}:1: training.epochs cannot be '0'; it takes a whole number of at least 1")


# YAML files and flags of earlier versions.


@pytest.mark.parametrize(
    "cls, before, after",
    [
        (DistillConfig, "distill: {lr: 0.2}", "optim: {lr: 0.2}"),
        (DistillConfig, "distill: {lr: 0.2, momentum: 0.8}", "optim: {lr: 0.2, momentum: 0.8}"),
        (DistillConfig, "distill: {weight_decay: 5e-3, T: 4}", "optim: {weight_decay: 5e-3}\ndistill: {T: 4}"),
        (DistillConfig, "distill: {balanced_sampling: true}", "synthesis: {balanced_sampling: true}"),
        (DistillConfig, "synthesis: {oh: 1, oh_target: answered}", "synthesis: {oh: 1, oh_target: predicted}"),
        (DistillConfig, "synthesis: {oh: 1, oh_target: asked}", "synthesis: {oh: 1, oh_target: target}"),
        (ScratchConfig, "training: {lr: 0.2, momentum: 0.8}", "optim: {lr: 0.2, momentum: 0.8}"),
        (ScratchConfig, "training: {weight_decay: 1e-3}", "optim: {weight_decay: 1e-3}"),
    ],
)
def test_files_of_earlier_versions_mean_what_they_meant(cls, before, after, file):
    config = read("--config", file(before, "before.yaml"), cls=cls)
    assert config == read("--config", file(after, "after.yaml"), cls=cls)
    assert config != cls() or "asked" in before
    assert read("--config", file(to_yaml(config), "printed.yaml"), cls=cls) == config
    assert result_options(config) == result_options(read("--config", file(after, "after.yaml"), cls=cls))


@pytest.mark.parametrize(
    "cls, before, after",
    [
        (DistillConfig, "--distill.lr=0.2", "--lr=0.2"),
        (DistillConfig, "--distill.momentum=0.5", "--optim.momentum=0.5"),
        (DistillConfig, "--distill.weight-decay=0.5", "--wd=0.5"),
        (DistillConfig, "--distill.balanced_sampling", "--balanced_sampling"),
        (DistillConfig, "--oh=1 --oh_target=answered", "--oh=1 --oh_target=predicted"),
        (ScratchConfig, "--training.lr=0.2", "--optim.lr=0.2"),
        (ScratchConfig, "--training.weight_decay=0.2", "--weight_decay=0.2"),
    ],
)
def test_flags_of_earlier_versions_mean_what_they_meant(cls, before, after):
    assert read(*before.split(), cls=cls) == read(*after.split(), cls=cls) != cls()


def test_a_wrong_value_in_a_former_section_is_named_where_it_is_written(file):
    path = file("distill:\n  lr: fast")
    assert refused("--config", path, cls=DistillConfig).startswith(f"{path}:2: distill.lr cannot be 'fast'")
    assert "--distill.lr cannot be '-1'" in refused("--distill.lr=-1", cls=DistillConfig)
    assert "one of target, predicted" in refused("--oh=1", "--oh_target=told", cls=DistillConfig)
    for section, cls in (("training", DistillConfig), ("distill", ScratchConfig)):  # each program has its own only
        assert "unknown key" in refused("--config", file(f"{section}: {{lr: 0.2}}"), cls=cls)
        assert "unknown option" in refused(f"--{section}.lr=0.2", cls=cls)


# Options of user-defined classes.

GREY = custom.name("Grey")
IN_A_FILE = {"source": "synthesis: {source: NAME}", "method": "method: NAME", "learner": "distill: {learner: NAME}"}
NAMED = ([f"--source={GREY}"], ["--source", GREY], [f"--synthesis.source={GREY}"], [f"--method={GREY}"])


@pytest.fixture
def rgal(file):
    """What datafree_kd.py gives the parser, with an empty method."""
    return {"cls": DistillConfig, "method_files": {"rgal": file("", "rgal.yaml")}, "other_configs": CONFIGS}


@pytest.mark.parametrize("named", NAMED)
def test_a_user_defined_class_may_have_options(named, rgal):
    def level(*words):
        config = read(*named, *words, **rgal)
        assert isinstance(config, DistillConfig) and config.synthesis.source == GREY
        return config.grey.level, config.grey.polarity, config.grey.dither

    assert level() == (0.5, "positive", None)
    assert level("--level", "0.25", "--polarity=negative") == (0.25, "negative", None)
    assert level("--grey.level=1", "--dither", "0.1") == level("--level=1", "--grey.dither=0.1") == (1, "positive", 0.1)
    assert level("--seed", "1", "--dither=") == (0.5, "positive", None)
    assert "unknown option --level" in refused("--level", "0.5", cls=DistillConfig)


@pytest.mark.parametrize("naming", [IN_A_FILE["source"], IN_A_FILE["method"]])
def test_options_of_a_user_defined_class_in_a_file(naming, file, rgal):
    naming = naming.replace("NAME", GREY)

    def given(*words):
        config = read(*words, **rgal)
        return config.grey.level, config.grey.polarity

    path = file(f"{naming}\ngrey: {{level: 0.25, polarity: negative}}", "named.yaml")
    based = file("base: named.yaml\ngrey: {level: 0.75}", "based.yaml")
    alone = file("grey: {level: 0.125}", "alone.yaml")
    assert given("--config", path) == (0.25, "negative")
    assert given("--config", path, "--level", "1") == (1, "negative")
    assert given("--config", based) == (0.75, "negative")
    assert given("--config", path, f"--config={alone}") == (0.125, "negative")
    assert given("--config", alone, "--source", GREY) == (0.125, "positive")
    wrong = file(f"{naming}\ngrey:\n  level: 2", "wrong.yaml")
    assert refused("--config", wrong, **rgal).startswith(f"{wrong}:3: grey.level cannot be '2'; it takes a number")
    wrong = file(f"{naming}\ngrey: {{leve: 0.5}}", "wrong.yaml")
    expected = f"{wrong}:2: unknown key grey.leve; did you mean grey: {{level: ...}}"
    assert refused("--config", wrong, **rgal).startswith(expected)


def test_a_method_file_may_name_a_class_with_options(file, rgal):
    rgal["method_files"]["plain"] = file(f"synthesis: {{source: {GREY}}}\ngrey: {{level: 0.25}}", "plain.yaml")
    config = read("--method", "plain", **rgal)
    assert (config.synthesis.source, config.grey.level) == (GREY, 0.25)
    assert read("--method", "plain", "--level", "0.5", **rgal).grey.level == 0.5


def test_options_of_a_class_that_a_later_flag_replaces_are_unused(file, rgal):
    path = file(f"synthesis: {{source: {GREY}}}\ngrey: {{level: 0.75}}", "named.yaml")
    assert result_options(read("--config", path, **rgal))["level"] == 0.75
    control = read("--config", path, "--source", "noise", **rgal)  # what a file sets may be switched off later
    assert "level" not in result_options(control)
    message = refused("--config", path, "--source", "noise", "--level=1", **rgal)
    assert "--level has no effect because source is noise" in message


def test_a_configuration_with_options_of_a_user_defined_class_reads_back(file, rgal):
    words = ("--source", GREY, "--level=0.25", "--dither=0.5", "--learner", custom.name("Scaled"), "--factor=2")
    config = read(*words, **rgal)
    again = read("--config", file(to_yaml(config)), **rgal)
    assert asdict(again) == asdict(config) and to_yaml(again) == to_yaml(config)
    written = yaml.safe_load(to_yaml(config))
    assert written["grey"] == {"level": 0.25, "polarity": "positive", "dither": 0.5}
    assert written["scaled"] == {"factor": 2.0}
    counted = result_options(config)
    assert (counted["level"], counted["dither"], counted["factor"]) == (0.25, 0.5, 2.0)


def test_the_traits_of_a_user_defined_source_tell_what_it_does_not_read():
    for words in ("--nz 8", "--lr_z 0.5", "--pool_size 500", "--generator_init maml", "--synthesis_rounds 2"):
        message = refused("--source", GREY, *words.split(), cls=DistillConfig)
        assert f"{words.split()[0]} has no effect because source is {GREY}" in message
    assert read("--source", GREY, "--bn", "1", cls=DistillConfig).synthesis.bn == 1
    stripes = nets.name("Stripes")  # has no traits
    assert read("--source", stripes, "--nz", "8", "--pool_size", "500", cls=DistillConfig).synthesis.nz == 8


@pytest.mark.parametrize(
    "words, message",
    [
        (f"--source {GREY} --level 2", "--level cannot be '2'; it takes a number from 0 to 1"),
        (f"--source {GREY} --polarity neutral", "one of positive, negative"),
        (f"--source {GREY} --polarit 1", "unknown option --polarit; did you mean --polarity?"),
        (f"--source {custom.name('Undecorated')}", "Undecorated.Options must be a dataclass"),
        (f"--source {custom.name('Unhelpful')}", "Unhelpful.Options must be a dataclass whose fields are made by"),
        (f"--source {custom.name('Greedy')}", "Greedy.Options: the name lr is taken"),
        (f"--source {custom.name('Distill')}", "Distill.Options: the name distill is taken"),
        (f"--source {GREY} --learner {custom.name('Distill')}", "the name distill is taken"),
    ],
)
def test_mistakes_in_options_of_a_user_defined_class(words, message):
    assert message in refused(*words.split(), cls=DistillConfig)


MINE = """
from dataclasses import dataclass
from functools import partial
from datafree.config import option

class {name}:
    @dataclass
    class Options:
        {field}: float = option(0.5, "A number.")

Partial = partial({name})
"""


@pytest.mark.parametrize("name", ["wd", "epoch", "no_download", "help", "dry_run", "method"])
def test_an_option_of_a_user_defined_class_may_not_take_the_spelling_of_another(name, file):
    path = file(MINE.format(name="Mine", field=name), "mine.py")
    assert f"Mine.Options: the name {name} is taken" in refused("--source", f"{path}:Mine", cls=DistillConfig)


@pytest.mark.parametrize(
    "first, second, taken",
    [
        ({"name": "Mine", "field": "one"}, {"name": "Mine", "field": "two"}, "mine"),
        ({"name": "Mine", "field": "one"}, {"name": "Yours", "field": "one"}, "one"),
    ],
)
def test_options_of_two_user_defined_classes_may_not_share_a_name(first, second, taken, file):
    source = f"{file(MINE.format(**first), 'a.py')}:{first['name']}"
    learner = f"{file(MINE.format(**second), 'b.py')}:{second['name']}"
    message = refused("--source", source, "--learner", learner, cls=DistillConfig)
    assert f"the name {taken} is taken" in message
    config = read("--source", source, "--method", source, cls=DistillConfig, method_files={})
    assert config.mine.one == 0.5  # one class under two options


def test_what_a_user_defined_name_refers_to_need_not_be_a_class(file):
    path = file(MINE.format(name="Mine", field="one"), "mine.py")
    assert read("--source", f"{path}:Partial", cls=DistillConfig).synthesis.source == f"{path}:Partial"


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.py:Grey", "there is no file 'nowhere.py'; check the path before the colon"),
        (custom.name("Gray"), "has no function or class 'Gray'; check the part of"),
        ("no_such_package.sources:Grey", "'no_such_package.sources' cannot be imported: ModuleNotFoundError"),
    ],
)
@pytest.mark.parametrize("naming", IN_A_FILE)
def test_a_user_defined_class_that_cannot_be_loaded(name, message, naming, file, rgal):
    path = file(IN_A_FILE[naming].replace("NAME", f"'{name}'"))
    for words in ([f"--{naming}", name], ["--config", path]):
        with pytest.raises(InputError) as caught:
            read(*words, **rgal)
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_lists_the_options_of_a_user_defined_class(capsys):
    with pytest.raises(SystemExit):
        read("--source", GREY, "--help", cls=DistillConfig)
    flat = " ".join(capsys.readouterr().out.split())
    assert "grey: Plain images. --level X Grey level. (default 0.5)" in flat
    assert "--polarity NAME Whether the level is inverted. (one of positive, negative; default positive)" in flat


# ---------------------------------------------------------------- where user-defined classes are looked for


def test_a_text_that_looks_like_a_class_is_none_outside_its_option(file, rgal):
    path = file('expect: {source: "RGAL, table 3: https://example.org"}\nsynthesis: {bn: 1}', "expect.yaml")
    assert read("--config", path, **rgal).synthesis.source == "inversion"
    assert "unknown key relation.source" in refused("--config", file("relation: {source: a.py:B}", "home.yaml"), **rgal)


def test_a_class_that_a_later_value_replaces_need_not_exist(file, rgal):
    path = file("synthesis: {source: gone/x.py:Gone}", "gone.yaml")
    assert read("--config", path, "--source", "noise", **rgal).synthesis.source == "noise"


def test_a_circle_of_bases_under_another_spelling_is_one_sentence(file, tmp_path):
    (tmp_path / "d").mkdir()
    path = file("base: ../d/a.yaml", "d/a.yaml")
    assert "base" in refused("--config", path, cls=DistillConfig)


def test_a_class_may_be_named_by_two_spellings(file, rgal):
    other = GREY.replace("/tests/", "/tests/../tests/")
    path = file(f"synthesis: {{source: {other}}}", "spelt.yaml")
    assert read("--config", path, "--source", GREY, "--level=0.25", **rgal).grey.level == 0.25


def test_an_option_that_is_set_in_two_sections_of_a_file_is_refused(file):
    path = file("distill:\n  lr: 0.2\noptim:\n  lr: 0.3\n", "both.yaml")
    assert "optim.lr is given twice (as " in refused("--config", path, cls=DistillConfig)
    assert "distill.lr)" in refused("--config", path, cls=DistillConfig)


def test_none_stands_for_nothing():
    assert read("--synthesis_rounds", "none", "--lr_z=none", cls=DistillConfig).schedule.synthesis_rounds is None


def test_a_base_that_is_missing_names_the_file_that_is_based_on_it(file):
    message = refused("--config", file("base: nowhere.yaml", "top.yaml"), cls=DistillConfig)
    assert "top.yaml:1" in message and "nowhere.yaml" in message


# An option of several words, and one that needs no flag.


@dataclass
class Several:
    """What is written."""

    path: str = option("", "From where.")
    kinds: tuple[Literal["a", "b", "c"], ...] = option(("a",), "Which.")
    count: int = option(1, "How many.")


@dataclass
class SeveralConfig:
    several: Several = field(default_factory=Several)


@pytest.mark.parametrize(
    "words, kinds",
    [
        (["--kinds", "b", "c", "--count", "2"], ("b", "c")),
        (["--kinds", "b,a"], ("b", "a")),
        (["--kinds=c", "c"], ("c",)),
        (["--kinds="], ()),
        ([], ("a",)),
    ],
    ids=str,
)
def test_an_option_takes_several_of_its_choices(words, kinds, file):
    config = read("x", *words, cls=SeveralConfig, first="path")
    assert (config.several.path, config.several.kinds) == ("x", kinds)
    assert read("--config", file(to_yaml(config)), cls=SeveralConfig) == config


def test_mistakes_in_several_choices_and_in_the_first_word(capsys):
    message = refused("--kinds", "a", "d", cls=SeveralConfig)
    assert message == "--kinds cannot be 'a,d'; it takes one or more of a, b, c"
    assert "unexpected argument 'x'" in refused("x", cls=SeveralConfig)
    assert "unexpected argument 'y'" in refused("x", "y", cls=SeveralConfig, first="path")
    assert "unknown option --gpu" in refused("--gpu", "0", cls=SeveralConfig)  # short for an option that is not there
    with pytest.raises(SystemExit):
        read("--help", cls=SeveralConfig, first="path")
    printed = capsys.readouterr().out
    assert " PATH [--option value ...]\n" in printed and "--several.count 1 are the same" in " ".join(printed.split())
