"""Fills the option classes of ``config.py`` from method files, YAML files and flags.

The later one wins: defaults < method file < ``--config`` files < flags, each in the
order given. YAML is composed but not constructed: a value arrives as the text that
stands in the file, as from a flag, and is converted by its declared type. So ``1e-3``
is a number, ``off`` is a word, and nothing in a file is ever executed.
"""

import difflib
import re
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from datafree.config import option, sections
from datafree.errors import OptionError

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
INTRO = """The later one wins: defaults, the method's file, --config files, flags. --seed 1, --seed=1 and
--run.seed 1 are the same, and so is run: {seed: 1} in a YAML file; - and _ are alike. An option that
shows no value is on or off: --dry_run, --dry_run false, --no_dry_run."""


@dataclass
class Invocation:
    """This call of the program; no part of a configuration."""

    help: bool = option(False, "Show this text and stop.", flags=("-h",))
    config: str = option("", "YAML file with options, in sections as below; may be given several times.")
    print_config: bool = option(False, "Print all options as YAML that --config reads, and stop.")
    dry_run: bool = option(False, "Check everything, say what would be done, and stop.")
    gpu: int = option(None, "Short for --device cuda:N.", low=0)


@dataclass(frozen=True)
class Option:
    """A field of a section ("": of the config itself), with its type resolved."""

    section: str
    name: str
    kind: type
    choices: tuple[str, ...]
    default: Any
    help: str
    flags: tuple[str, ...] = ()
    low: float = -inf
    high: float = inf
    idle: tuple = field(default=(), hash=False)
    own: bool = False

    @property
    def allowed(self):
        """What may be given, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}" + ", or path/to/file.py:Class" * self.own
        words = {
            bool: "true or false",
            int: "a whole number",
            float: "a number",
            tuple: "numbers with commas between",
            str: "a text that is not empty" if self.default else "a text",
        }[self.kind]
        if self.high < inf:
            words += f" from {self.low:g} to {self.high:g}"
        elif self.low > -inf:
            words += f" of at least {self.low:g}"
        return f"{words}, or nothing" if self.default is None else words


class Setting(NamedTuple):
    """A value as written (None: YAML's null) and its place, for messages."""

    option: Option
    text: str | None
    place: str
    source: str = "flags"  # or the file that it stands in


def parse(config_class, argv, *, description, method_files=None, examples=""):
    """Read the words of a command line into ``(config_class instance, Invocation)``.

    ``method_files`` maps the names that ``--method`` may have to their YAML files.
    ``--help`` prints and exits. Raises OptionError, one line, for whatever is
    unknown, malformed or out of its bounds, even where a later value replaces it.
    """
    options = {o.name: o for o in list_options(config_class, method_files)}
    if {"-h", "--help"} & set(argv):
        print(_help(options, config_class, description, method_files, examples))
        sys.exit(0)
    flags = _read_flags(argv, options)
    files = [s.text for s in flags if s.option.name == "config"]
    settings = [s for path in files for s in _read_yaml(path, options)] + flags
    preset = _method_settings(settings, options, method_files)
    values = {s.option.name: _convert(s) for s in preset + settings}
    _refuse_idle(settings, preset, values, options)
    parts = {name: _fill(section, values) for name, section in sections(config_class).items()}
    return _fill(config_class, values | parts), _fill(Invocation, values)


def to_yaml(config):
    """The config as nested YAML that ``--config`` reads back to an equal one."""
    values = sorted(asdict(config).items(), key=lambda item: isinstance(item[1], dict))
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=inf)


def active(config_class, values):
    """``values`` (option -> value) without those of options that nothing reads beside the others."""
    options = {o.name: o for o in list_options(config_class)}
    return {
        name: value
        for name, value in values.items()
        if name not in options or not _idle_for(options[name], values, options)
    }


def list_options(config_class, method_files=None):
    """Every Option of a program, in the order of ``--help``."""
    found = []
    for section, cls in {"call": Invocation, "": config_class, **sections(config_class)}.items():
        for f in (f for f in fields(cls) if "help" in f.metadata):
            kind, choices = get_type_hints(cls)[f.name], ()
            if get_origin(kind) is Literal:
                kind, choices = str, get_args(kind)
            elif f.name == "method":
                choices = tuple(sorted(method_files or ()))
            metadata = {"idle": getattr(cls, "IDLE", ()), **f.metadata}
            if any(f.name in case for case in metadata["idle"]):
                metadata["idle"] = ()  # the option that the section's others hang on
            found.append(Option(section, f.name, get_origin(kind) or kind, choices, f.default, **metadata))
    return found


def _fill(cls, values):
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def _method_settings(settings, options, method_files):
    """What the file of the last method named in ``settings``, or of the default one, sets; a class is a source."""
    if "method" not in options or method_files is None:
        return []
    method = options["method"]
    named = [s for s in settings if s.option is method] or [Setting(method, method.default, "--method")]
    others = {name: o for name, o in options.items() if o is not method}
    name = _convert(named[-1])
    return (
        _read_yaml(method_files[name], others)
        if name in method_files
        else [Setting(options["source"], name, named[-1].place)]
    )


def _refuse_idle(settings, preset, values, options):
    """Raise an OptionError for a setting that changes an option which nothing would read.

    Only where it is idle by what stands in the same file, in an earlier one or in no file: a flag, or a file
    based on another, may switch off what the earlier one sets, options and all.
    """
    defaults = {name: o.default for name, o in options.items()}
    before = defaults | {s.option.name: _convert(s) for s in preset}
    sources = list(dict.fromkeys(s.source for s in settings))
    decided = {s.option.name: sources.index(s.source) for s in settings}
    decided = {s.option.name: decided.get("method", -1) for s in preset} | decided

    for setting in settings:
        opt, level = setting.option, sources.index(setting.source)
        reasons = _idle_for(opt, defaults | values, options)
        if reasons and values[opt.name] != before[opt.name] and all(decided.get(name, -1) <= level for name in reasons):
            told = " and ".join(f"{name} is {_shown(value)}" for name, value in reasons.items())
            raise _error(f"{setting.place} would change nothing, for {told}; leave {opt.name} out, or change that")


def _idle_for(opt, values, options, asked=()):
    """Name -> value of what makes an option idle; empty if anything reads it. ``asked``: options on the way here."""
    for case in opt.idle:
        reasons = [_rest(name, rests, opt, values, options, asked) for name, rests in case.items()]
        if all(reasons):
            return {name: value for reason in reasons for name, value in reason.items()}
    return {}


def _rest(name, rests, opt, values, options, asked):
    """Why the option ``name`` gives ``opt`` nothing to do: its value is among ``rests``, or it is idle itself."""
    if name in asked:
        return {}  # for it would be idle by its own value
    value = values.get(name, options[name].default)
    return {name: value} if value in rests else _idle_for(options[name], values, options, (*asked, opt.name))


def _convert(setting):
    opt, text, place, _ = setting
    if text is None:
        text = "none" if "none" in opt.choices else ""
    try:
        return _value(opt, text)
    except (ValueError, KeyError):
        near = _nearest(text, {name: name for name in opt.choices}, otherwise="")
        raise _error(f"{place} cannot be {text!r}; it takes {opt.allowed}{near}") from None


def _value(opt, text):
    if opt.default is None and not text:
        return None
    if opt.own and ":" in text:
        return text
    if opt.choices:
        word = {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(text.lower(), text.lower())
        return opt.choices[opt.choices.index(text if text in opt.choices else word)]
    if opt.kind is bool:
        return BOOLEANS[text.lower()]
    if opt.kind is tuple:
        return tuple(_number(opt, float, part) for part in text.split(",")) if text else ()
    if opt.kind is str:
        if opt.default and not text:
            raise ValueError("only a text that is empty by default may be empty")
        return text
    return _number(opt, opt.kind, text)


def _number(opt, kind, text):
    number = kind(text)
    if abs(number) == inf or not opt.low <= number <= opt.high:  # NaN fails the bounds
        raise ValueError("not finite, or out of bounds")
    return number


def _read_flags(argv, options):
    table, words, settings = _flag_table(options), list(argv), []
    while words:
        flag, equals, text = words.pop(0).partition("=")
        if not _is_flag(flag):
            raise _error(f"unexpected word {flag + equals + text!r}; an option starts with --")
        name = "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag
        if name not in table:
            raise _error(f"unknown option {flag}{_nearest(name, {o: f'--{o}' for o in options})}")
        opt, alone = table[name]
        if equals and alone == "false":
            raise _error(f"{flag} takes no value; write --{opt.name}={text}")
        if not equals:
            text = words.pop(0) if words and alone != "false" and not _is_flag(words[0]) else alone
        if text is None:
            raise _error(f"{flag} needs a value, {opt.allowed} (one that starts with - as {flag}=VALUE)")
        setting = Setting(opt, text, flag)
        if opt.name == "gpu":
            setting = Setting(options["device"], f"cuda:{_convert(setting)}", flag)
        settings.append(setting)
    return settings


def _flag_table(options):
    """Spelling -> its option, and the text that the flag stands for without a value (None: it needs one)."""
    table = {}
    for opt in options.values():
        for flag in (f"--{opt.name}", "--" + f"{opt.section}.{opt.name}".lstrip("."), *opt.flags):
            table[flag] = opt, "true" if opt.kind is bool else None
        if opt.kind is bool:
            table[f"--no_{opt.name}"] = opt, "false"
    return table


def _is_flag(word):
    return re.match(r"--|-[A-Za-z]", word) is not None  # -2 and -.5 are values


def _read_yaml(path, options, above=()):
    """Settings of a YAML file, after those of the file that its key ``base`` names, relative to it.

    above: the files whose base this one is. A block ``expect`` states results and is not read here.
    """
    options = {name: o for name, o in options.items() if o.section != "call"}
    names = {o.section for o in options.values()} - {""}
    below, settings = [], []
    for key, node, place in _items(_compose(path), path, "the file must hold names and values"):
        if key == "expect":
            _items(node, path, "expect must hold names and values")
        elif key == "base":
            below = _read_base(path, node, place, options, above)
        elif key in names:
            inner = _items(node, path, f"{key} is a section: write {key}: {{NAME: VALUE}}")
            settings += [_yaml_setting(key, *item, options) for item in inner]
        else:
            settings.append(_yaml_setting("", key, node, place, options))
    return below + [setting._replace(source=str(path)) for setting in settings]


def _read_base(path, node, place, options, above):
    base = Path(path).parent / str(node.value)
    if node.id != "scalar" or base.resolve() in above:
        raise _error(f"{place}: base names one other YAML file, which is not based on this one")
    return _read_yaml(base, options, (*above, Path(path).resolve()))


def _compose(path):
    try:
        return yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise _error(f"cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        raise _error(f"{path}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise _error(f"{path} is not a text file: {error.reason}") from None


def _items(node, path, problem):
    """``(key, value node, file:line)`` of each line of a mapping, which may be empty."""
    if node is None or _is_null(node):
        return []
    if node.id != "mapping":
        raise _error(f"{path}:{node.start_mark.line + 1}: {problem}")
    items = {}
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if key.id != "scalar":
            raise _error(f"{place}: a {key.id} cannot be a name")
        if key.value in items:
            raise _error(f"{place}: {key.value} is given twice")
        items[key.value] = key.value, value, place
    return items.values()


def _is_null(node):
    return node.id == "scalar" and node.style is None and node.value.lower() in ("", "~", "null")


def _yaml_setting(section, name, node, place, options):
    opt, dotted = options.get(name), f"{section}.{name}".lstrip(".")
    if opt is None or opt.section != section:
        homes = {o.section: o.section for o in options.values() if o.section}
        homes |= {key: f"{o.section}: {{{key}: ...}}" if o.section else key for key, o in options.items()}
        raise _error(f"{place}: unknown key {dotted}{_nearest(name, homes)}")
    if opt.kind is tuple and node.id == "sequence" and all(part.id == "scalar" for part in node.value):
        return Setting(opt, ",".join(part.value for part in node.value), f"{place}: {dotted}")
    if node.id != "scalar":
        raise _error(f"{place}: {dotted} cannot be a {node.id}; it takes {opt.allowed}")
    return Setting(opt, None if _is_null(node) else node.value, f"{place}: {dotted}")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _error(message):
    return OptionError(" ".join(message.split()))


def _nearest(word, spellings, otherwise="; --help lists them"):
    """A clause with the spellings of the names nearest to the last part of ``word``."""
    word = word.split(".")[-1].lstrip("-")
    near = [word] if word in spellings else difflib.get_close_matches(word, spellings, n=2)
    return f"; did you mean {' or '.join(spellings[name] for name in near)}?" if near else otherwise


def _help(options, config_class, description, method_files, examples):
    width = min(shutil.get_terminal_size().columns, 100)
    from_method = {s.option: _convert(s) for s in _method_settings([], options, method_files)}
    blocks = [
        f"usage: {Path(sys.argv[0]).name} [--option value ...]",
        *(textwrap.fill(textwrap.dedent(text).strip(), width) for text in (description, INTRO)),
    ]
    for name, section in {"call": Invocation, "": None, **sections(config_class)}.items():
        title = f"{name}: {section.__doc__}" if section else "Outside the sections:"
        entries = [_help_entry(o, from_method, width) for o in options.values() if o.section == name]
        blocks += ["\n".join([textwrap.fill(title, width), *entries])] if entries else []
    blocks += ["examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")] if examples else []
    return "\n\n".join(blocks)


def _help_entry(opt, from_method, width):
    value = "NAME" if opt.choices else {bool: "", int: "N", float: "X", tuple: "X,X,X", str: "TEXT"}[opt.kind]
    facts = [opt.allowed] if opt.choices else []
    facts.append(f"default {_shown(opt.default)}")
    if from_method.get(opt, opt.default) != opt.default:
        facts.append(f"the default method sets {_shown(from_method[opt])}")
    left = f"  {', '.join([f'--{opt.name}', *opt.flags])} {value}"
    return textwrap.fill(
        f"{opt.help} ({'; '.join(facts)})",
        width,
        initial_indent=f"{left:27} ",
        subsequent_indent=" " * 28,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _shown(value):
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return {"": "empty", "True": "true", "False": "false", "None": "none"}.get(str(value), str(value))
