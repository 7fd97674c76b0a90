"""Fills the option classes of ``config.py`` from method files, YAML files and flags.

The later one wins: defaults < method file < ``--config`` files < flags, each in the
order given. YAML is composed but not constructed: a value is the text in the file,
as from a flag, and is converted by its declared type. So ``1e-3`` is a number, and
``off`` is a word. No tag of YAML is obeyed; but a value may name code, which is run
(``student: net.py:small``), and so is that which the card of a data set names.

A user-defined class named by an option may have options of its own, the fields of a
dataclass ``Options`` within it, which become a section named like the class.
"""

import difflib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from datafree import __version__
from datafree.config import sections
from datafree.errors import OptionError, printable, short, shown
from datafree.options import Invocation, Option, Options, list_options, why_unused, with_custom_sections
from datafree.plugins import is_custom
from datafree.registry import shipped
from datafree.untrusted import LONGEST_NAME, TextLoader, is_name, read_text

BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LONGEST_TEXT = 4000  # characters of a value; a path has at most 4,096 bytes
LONGEST_CHAIN = 20  # of files that are based on one another
INTRO = """Precedence, lowest first: defaults, the method's file, --config files, flags. --NAME 1, --NAME=1 and
--SECTION.NAME 1 are the same, and so is SECTION: {NAME: 1} in a YAML file; - and _ are equivalent. An option that
shows no value is on or off: --dry_run, --dry_run false, --no_dry_run. A name with a colon, such as net.py:small, is
code, which is executed, even by --dry_run; read a YAML file or data card of somebody else before you use it."""


class Setting(NamedTuple):
    """A value as written (None: YAML's null) and its place, for messages."""

    option: Option
    text: str | None
    place: str
    source: str = "flags"  # or the file that it is in


def parse(
    config_class: type,
    argv: Sequence[str],
    *,
    description: str,
    method_files: Mapping[str, Any] | None = None,
    other_configs: Iterable[type] = (),
    examples: str = "",
    first: str = "",
) -> tuple[Any, Invocation]:
    """Read a command line into ``(config_class instance, Invocation)``.

    first: the option that the first word gives if it is none itself.

    ``method_files`` maps the names that ``--method`` accepts to their YAML files, which may also have sections of
    ``other_configs``, the other programs' classes. If a user-defined class has ``Options``, the instance is of a
    subclass of ``config_class`` with a section for them.
    ``--help`` and ``--version`` print and exit. Raises OptionError, one line, for anything unknown, malformed or out of
    bounds, even if a later value replaces it, and InputError for a user-defined class that cannot be loaded.
    """
    if first and argv and not _is_flag(argv[0]):
        argv = [f"--{first}", *argv]
    options = {o.name: o for o in list_options(config_class, method_files)}
    named = _class_names(argv, options, method_files)
    config_class = with_custom_sections(config_class, named, _flag_table(options))
    options = {o.name: o for o in list_options(config_class, method_files)}
    if "--version" in argv:
        print(__version__)
        sys.exit(0)
    if {"-h", "--help"} & set(argv):
        print(_help(options, config_class, description, method_files, examples, first))
        sys.exit(0)
    flags = _read_flags(argv, options)
    files = [s.text for s in flags if s.option.name == "config"]
    settings = [s for path in files for s in _read_yaml(path, options)] + flags
    preset = _method_settings(settings, options, method_files, _foreign(config_class, other_configs))
    values = {s.option.name: _convert(s) for s in preset + settings}
    _refuse_unused(settings, preset, values, options)
    _refuse_two_lengths(flags, values)
    parts = {name: _fill(section, values) for name, section in sections(config_class).items()}
    return _fill(config_class, values | parts), _fill(Invocation, values)


def to_yaml(config: Any) -> str:
    """The config as nested YAML that ``--config`` reads back to an equal one."""
    values = sorted(asdict(config).items(), key=lambda item: isinstance(item[1], dict))
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=inf)


def _class_names(
    argv: Sequence[str], options: Options, method_files: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    """(option, value) of the options that may name a class, in files and flags; mistakes are reported later."""
    homes = {opt.name: opt.section for opt in options.values() if opt.custom}
    flags = {flag: opt.name for flag, (opt, _) in _flag_table(options).items() if opt.name in {*homes, "config"}}
    in_files: list[tuple[str, str]] = []
    in_flags: list[tuple[str, str]] = []
    for word, following in zip(argv, [*argv[1:], ""]):
        flag, equals, text = word.partition("=")
        name, text = flags.get("--" + flag[2:].replace("-", "_")), text if equals else following
        if name == "config":
            in_files += _texts(Path(text), homes)
        elif name:
            in_flags.append((name, text))
    found = in_files + in_flags
    if "method" in options and method_files:
        method = dict(found).get("method", options["method"].default)
        found = (_texts(Path(method_files[method]), homes) if method in method_files else []) + found
    return found


def _texts(path: Path, homes: Mapping[str, str], above: tuple[Path, ...] = ()) -> list[tuple[str, str]]:
    """(option, value) of options in a YAML file and those that it is based on; [] if it cannot be read.

    homes: option -> the section in which it stands.
    """
    try:
        root = _compose(path)
    except OptionError:
        return []
    above = (*above, Path(os.path.realpath(path)))
    lines = [("", *line) for line in _scalars(root)]
    lines += [(section, *line) for section, node in _mappings(root) for line in _scalars(node)]
    bases = [path.parent / text for section, key, text in lines if key == "base" and not section and text.isprintable()]
    further = [base for base in bases[-1:] if len(above) <= LONGEST_CHAIN and Path(os.path.realpath(base)) not in above]
    below = [pair for base in further for pair in _texts(base, homes, above)]
    return below + [(key, text) for section, key, text in lines if homes.get(key) == section]


def _scalars(node: Any) -> list[tuple[str, str]]:
    """(key, text) of the scalar values of a mapping."""
    pairs = node.value if node is not None and node.id == "mapping" else []
    return [(key.value, value.value) for key, value in pairs if key.id == value.id == "scalar"]


def _mappings(node: Any) -> list[tuple[str, Any]]:
    """(key, mapping) of the mappings in a mapping."""
    pairs = node.value if node is not None and node.id == "mapping" else []
    return [(key.value, value) for key, value in pairs if key.id == "scalar" and value.id == "mapping"]


def _foreign(config_class: type, other_configs: Iterable[type]) -> dict[str, dict[str, Option]]:
    """Section -> its options, of the sections that only other programs have."""
    found: dict[str, dict[str, Option]] = {}
    for cls in other_configs:
        for opt in list_options(cls):
            for section in {opt.section, *opt.also_in} - {"call", "", *sections(config_class)}:
                found.setdefault(section, {})[opt.name] = opt
    return found


def _fill(cls: type, values: Mapping[str, Any]) -> Any:
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def _method_settings(
    settings: list[Setting],
    options: Options,
    method_files: Mapping[str, Any] | None,
    foreign: Mapping[str, Options] | None = None,
) -> list[Setting]:
    """The settings of the last method named in ``settings``, or of the default one; a class is a source."""
    if "method" not in options or method_files is None:
        return []
    method = options["method"]
    named = [s for s in settings if s.option is method] or [Setting(method, method.default, "--method")]
    others = {name: o for name, o in options.items() if o is not method}
    name = _convert(named[-1])
    return (
        _read_yaml(method_files[name], others, foreign)
        if name in method_files
        else [Setting(options["source"], name, named[-1].place)]
    )


def _refuse_unused(settings: list[Setting], preset: list[Setting], values: dict[str, Any], options: Options) -> None:
    """Raise an OptionError for a setting that changes an option which nothing would read.

    Only if it is unused because of a value in the same file, in an earlier one or in no file: a flag, or a file
    based on another, may disable what an earlier file sets, options and all.
    """
    defaults = {name: o.default for name, o in options.items()}
    before = defaults | {s.option.name: _convert(s) for s in preset}
    sources = list(dict.fromkeys(s.source for s in settings))
    decided = {s.option.name: sources.index(s.source) for s in settings}
    decided = {s.option.name: decided.get("method", -1) for s in preset} | decided

    for setting in settings:
        opt, level = setting.option, sources.index(setting.source)
        reasons = why_unused(opt, defaults | values, options)
        if reasons and values[opt.name] != before[opt.name] and all(decided.get(name, -1) <= level for name in reasons):
            because = " and ".join(f"{name} is {display(value)}" for name, value in reasons.items())
            change = f"the {next(iter(reasons))}" if len(reasons) == 1 else "one of these"
            raise _error(f"{setting.place} has no effect because {because}; remove it or change {change}")


def _refuse_two_lengths(flags: list[Setting], values: Mapping[str, Any]) -> None:
    """Raise an OptionError for a flag --epochs beside a budget; in a file epochs are proportions of its recipe then."""
    for flag in flags:
        if flag.option.name == "epochs" and values.get("budget"):
            raise _error(
                f"{flag.place} {short(str(flag.text))} does not go with --budget {values['budget']}, which decides how "
                "many epochs there are; remove one of them"
            )


def _convert(setting: Setting) -> Any:
    opt, text, place, _ = setting
    if text is None:
        text = "none" if "none" in opt.choices else ""
    if not text.isprintable() or len(text) > LONGEST_TEXT:
        raise _error(f"{place} cannot be {shown(text)}; it takes up to {LONGEST_TEXT:,} printable characters")
    if opt.is_name and text and not is_name(text):
        raise _error(
            f"{place} cannot be {shown(text)}; it names a folder, in up to {LONGEST_NAME} bytes and without slashes"
        )
    if text.startswith("~/"):  # which the shell leaves as it is after an equals sign, and in files
        text = os.path.expanduser(text)
    try:
        return _value(opt, text)
    except (ValueError, KeyError, OverflowError):
        near = _nearest(text, {name: name for name in opt.choices}, otherwise="")
        raise _error(f"{place} cannot be {shown(text)}; it takes {opt.allowed}{near}") from None


def _value(opt: Option, text: str) -> Any:
    if opt.default is None and text in ("", "none"):
        return None
    if opt.custom and is_custom(text):
        return text
    text = opt.aliases.get(text, text)
    if opt.choices and opt.kind is tuple:
        return tuple(dict.fromkeys(_choice(opt, part.strip()) for part in text.split(","))) if text else ()
    if opt.choices:
        return _choice(opt, text)
    if opt.kind is bool:
        return BOOLEANS[text.lower()]
    if opt.kind is tuple:
        return tuple(_number(opt, float, part) for part in text.split(",")) if text else ()
    if opt.kind is str:
        if opt.default and not text:
            raise ValueError("only a text that is empty by default may be empty")
        return text
    return _number(opt, opt.kind, text)


def _choice(opt: Option, text: str) -> str:
    word = {"true": "on", "yes": "on", "false": "off", "no": "off"}.get(text.lower(), text.lower())
    return opt.choices[opt.choices.index(text if text in opt.choices else word)]


def _number(opt: Option, kind: type, text: str) -> float:
    number = kind(text)
    if abs(number) == inf or not opt.low <= number <= opt.high:  # NaN fails the bounds
        raise ValueError("not finite, or out of bounds")
    return number


def _read_flags(argv: Sequence[str], options: Options) -> list[Setting]:
    table, words, settings = _flag_table(options), list(argv), []
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not _is_flag(flag):
            raise _error(f"unexpected argument {shown(word)}; an option starts with --")
        name = "--" + flag[2:].replace("-", "_") if flag.startswith("--") else flag
        if name not in table:
            raise _error(f"unknown option {short(flag)}{_nearest(name, {o: f'--{o}' for o in options})}")
        opt, alone = table[name]
        if equals and alone == "false":
            raise _error(f"{flag} takes no value; write --{opt.name}={value}")
        text: str | None = value
        if not equals:
            text = words.pop(0) if words and alone != "false" and not _is_flag(words[0]) else alone
        while opt.choices and opt.kind is tuple and words and not _is_flag(words[0]):
            text = f"{text},{words.pop(0)}"
        if text is None:
            raise _error(f"{flag} needs a value, {opt.allowed} (one that starts with - as {flag}=VALUE)")
        setting = Setting(opt, text, flag)
        if opt.name == "gpu":
            setting = Setting(options["device"], f"cuda:{_convert(setting)}", flag)
        settings.append(setting)
    return settings


def _flag_table(options: Options) -> dict[str, tuple[Option, str | None]]:
    """Spelling -> its option, and the text that the flag stands for without a value (None: it needs one)."""
    table = {}
    for opt in options.values():
        dotted = [f"--{section}.{opt.name}" for section in (opt.section, *opt.also_in) if section]
        for flag in (f"--{opt.name}", *dotted, *opt.flags):
            table[flag] = opt, "true" if opt.kind is bool else None
        if opt.kind is bool:
            table[f"--no_{opt.name}"] = opt, "false"
    return table


def _is_flag(word: str) -> bool:
    return re.match(r"--|-[A-Za-z]", word) is not None  # -2 and -.5 are values


def _read_yaml(
    path: Any, options: Options, foreign: Mapping[str, Options] | None = None, above: tuple[Path, ...] = ()
) -> list[Setting]:
    """Settings of a YAML file, after those of the file that its key ``base`` names, relative to it.

    foreign: sections of other programs, which are checked and left out. above: the files whose base this one is.
    A block ``expect`` states results and is not read here.
    """
    foreign, path = foreign or {}, shipped(path)
    options = {name: o for name, o in options.items() if o.section != "call"}
    names = {section for o in options.values() for section in (o.section, *o.also_in)} - {""}
    below: list[Setting] = []
    settings: list[Setting] = []
    for key, node, place in _items(_compose(path), path, "the file must hold names and values"):
        if key == "expect":
            _items(node, path, "expect must hold names and values")
        elif key == "base":
            below = _read_base(path, node, place, options, foreign, above)
        elif key in names or key in foreign:
            inner = _items(node, path, f"{key} is a section: write {key}: {{NAME: VALUE}}")
            found = [_yaml_setting(key, *item, options if key in names else foreign[key]) for item in inner]
            settings += found if key in names else []
            for setting in found:
                _convert(setting)
        else:
            settings.append(_yaml_setting("", key, node, place, options))
    first: dict[Option, Setting] = {}
    for setting in settings:
        if first.setdefault(setting.option, setting) is not setting:
            raise _error(f"{setting.place} is given twice (as {first[setting.option].place}); remove one of them")
    return below + [setting._replace(source=str(path)) for setting in settings]


def _read_base(
    path: Any, node: Any, place: str, options: Options, foreign: Mapping[str, Options], above: tuple[Path, ...]
) -> list[Setting]:
    base, above = Path(path).parent / str(node.value), (*above, Path(os.path.realpath(path)))
    if node.id == "scalar" and not os.path.isfile(base):
        raise _error(f"{place}: there is no file {base} to be based on")
    if node.id != "scalar" or Path(os.path.realpath(base)) in above:
        raise _error(f"{place}: base names one other YAML file, which is not based on this one")
    if len(above) > LONGEST_CHAIN:
        raise _error(f"{place}: more than {LONGEST_CHAIN} files that are based on one another; join them")
    return _read_yaml(base, options, foreign, above)


def _compose(path: Any) -> Any:
    try:
        return yaml.compose(read_text(path), Loader=TextLoader)
    except OSError as error:
        raise _error(f"cannot read {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        raise _error(f"{path}:{error.problem_mark.line + 1}: not valid YAML: {error.problem}") from None
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise _error(f"{path} is not a text file: {error.reason}") from None


def _items(node: Any, path: Any, problem: str) -> Iterable[tuple[str, Any, str]]:
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
            raise _error(f"{place}: {short(key.value)} is given twice")
        items[key.value] = key.value, value, place
    return items.values()


def _is_null(node: Any) -> bool:
    return node.id == "scalar" and node.style is None and node.value.lower() in ("", "~", "null")


def _yaml_setting(section: str, name: str, node: Any, place: str, options: Options) -> Setting:
    opt, dotted = options.get(name), f"{section}.{name}".lstrip(".")
    if opt is None or section not in (opt.section, *opt.also_in):
        homes = {o.section: o.section for o in options.values() if o.section}
        homes |= {key: f"{o.section}: {{{key}: ...}}" if o.section else key for key, o in options.items()}
        raise _error(f"{place}: unknown key {short(dotted)}{_nearest(name, homes)}")
    if opt.kind is tuple and node.id == "sequence" and all(part.id == "scalar" for part in node.value):
        return Setting(opt, ",".join(part.value for part in node.value), f"{place}: {dotted}")
    if node.id != "scalar":
        raise _error(f"{place}: {dotted} cannot be a {node.id}; it takes {opt.allowed}")
    return Setting(opt, None if _is_null(node) else node.value, f"{place}: {dotted}")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def _error(message: str) -> OptionError:
    return OptionError(printable(message))


def _nearest(word: str, spellings: Mapping[str, str], otherwise: str = "; --help lists them") -> str:
    """A clause with the spellings of the names nearest to the last part of ``word``, two at most, if any is alike."""
    word = word.split(".")[-1].lstrip("-")
    near = [word] if word in spellings else difflib.get_close_matches(word, spellings, n=2, cutoff=0.65)
    return f"; did you mean {' or '.join(spellings[name] for name in near)}?" if near else otherwise


def _help(
    options: Options,
    config_class: type,
    description: str,
    method_files: Mapping[str, Any] | None,
    examples: str,
    first: str,
) -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    from_method = method_defaults(options, method_files)
    shown = options.get("seed") or next(o for o in options.values() if o.kind is int)
    intro = INTRO.replace("SECTION", shown.section).replace("NAME", shown.name)
    blocks = [
        " ".join(["usage:", Path(sys.argv[0]).name, *([first.upper()] if first else []), "[--option value ...]"]),
        textwrap.fill(textwrap.dedent(description).strip(), width),
        textwrap.fill(intro if method_files else intro.replace("the method's file, ", ""), width),
    ]
    for name, section in {"call": Invocation, "": None, **sections(config_class)}.items():
        title = f"{name}: {section.__doc__ or section.__name__}" if section else "Outside the sections:"
        entries = [_help_entry(o, from_method, width) for o in options.values() if o.section == name]
        blocks += ["\n".join([textwrap.fill(title, width), *entries])] if entries else []
    blocks += ["examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")] if examples else []
    return "\n\n".join(blocks)


def method_defaults(options: Options, method_files: Mapping[str, Any] | None) -> dict[Option, Any]:
    """What the file of the default method sets."""
    return {s.option: _convert(s) for s in _method_settings([], options, method_files)}


def shown_default(opt: Option, from_method: Mapping[Option, Any]) -> str:
    """The value of an option that is not given, in words. from_method: of :func:`method_defaults`."""
    value = from_method.get(opt, opt.default)
    changed = f"; the default method sets {display(value)}" * (value != opt.default)
    return f"{display(opt.default)}{changed}"


def _help_entry(opt: Option, from_method: Mapping[Option, Any], width: int) -> str:
    value = "NAME" if opt.choices else {bool: "", int: "N", float: "X", tuple: "X,X,X", str: "TEXT"}[opt.kind]
    facts = [opt.allowed] if opt.choices else []
    facts.append(f"default {shown_default(opt, from_method)}")
    left = f"  {', '.join([f'--{opt.name}', *opt.flags])} {value}"
    return textwrap.fill(
        f"{opt.help} ({'; '.join(facts)})",
        width,
        initial_indent=f"{left:27} ",
        subsequent_indent=" " * 28,
        break_long_words=False,
        break_on_hyphens=False,
    )


def display(value: Any) -> str:
    """A value of an option, as help and messages show it."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    return {"": "empty", "True": "true", "False": "false", "None": "none"}.get(str(value), str(value))
