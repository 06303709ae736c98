"""--template: a name, a string, a file, or the model's own chat template.

A chat template is jinja2 code that comes with the model, so it runs in jinja2's sandbox. It is
rendered with markers in place of what users and the model say. The markers' places tell template
and content apart: special tokens are honoured in the one and never in the other.
"""

import dataclasses
import datetime
import re
from pathlib import Path

from data import TEMPLATES, TEXT, Template
from support.rows import check_text
from support.files import read_json, read_text, weight_files
from support.processes import say
from support.tokenizer import Tokenizer

# What looks like a special token to a reader of a template.
MARK = re.compile(r"<\|[^|<>]{1,40}\|>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>")


# ------------------------------------------------------------------------------------- the options


def choose_template(args, rows, trained=None):
    """The Template that --template and --system ask for, else that of a prompt's training.

    Without both it is the paper's, or the model's chat template where a row holds messages.
    Raises ValueError or OSError with the reason where there is no such template.
    """
    if args.system is not None and args.template not in (None, "chat"):
        raise ValueError("--system goes with --template chat only")
    if args.template or args.system is not None:
        return read_template(args.template or "chat", args.model, args.system)
    if trained:
        return with_chat(trained, args.model)
    if any(row.is_chat for row in rows):
        return read_template("chat", args.model)
    if rows and not all(row.raw for row in rows) and has_chat_template(args.model):
        say("template sentiment; the model has a chat template, too: --template chat asks in it")
    return TEMPLATES["sentiment"]


def read_template(value, folder, system=None):
    """A name of TEMPLATES, "chat", a string with {text}, or a file -> Template.

    It ends where the answer starts. A space at its end is dropped, because it belongs to the
    answer. Where it ends with a line's end or a special token, the answer has no space before it.
    """
    if value in TEMPLATES:
        return TEMPLATES[value]
    if value == "chat":
        weight_files(folder)  # the first to say that this is not a model folder
        tokenizer = Tokenizer(folder)
        template = Chat(folder, system).template(tokenizer)
        point_out_marks(template.string, tokenizer)
        return template
    where = f"--template {value!r}"
    if TEXT not in value and Path(value).is_file():
        where = value
        string = read_text(value).removesuffix("\n")
    else:
        string = value.replace("\\n", "\n")  # a shell passes \n on as two characters
    check_text(string, "--template")
    if string.count(TEXT) != 1:
        names = ", ".join(TEMPLATES)
        raise ValueError(
            f"{where}: expected {names}, chat, a file, or a string that holds {{text}} exactly once"
        )
    if "{label}" in string:
        raise ValueError(f"{where}: a template ends where the answer starts: take {{label}} out")
    string = string.rstrip(" ")
    ends_with_token = False
    if folder:
        weight_files(folder)
        tokenizer = Tokenizer(folder)
        point_out_marks(string, tokenizer)
        ends_with_token = string.endswith(tuple(tokenizer.names))
    space = "" if ends_with_token or string.endswith("\n") else " "
    return Template(string, space)


def point_out_marks(string, tokenizer):
    """Say which strings of a template look like special tokens and are none of this tokenizer."""
    marks = dict.fromkeys(MARK.findall(string))
    unknown = [mark for mark in marks if mark not in tokenizer.names]
    if unknown:
        say(
            f"template {', '.join(unknown)}: no special token of this tokenizer: read as ordinary "
            "characters"
        )


# ------------------------------------------------------------------------------------- in spul.json


def template_to_json(template):
    """-> a string, or for a template with more than a string an object."""
    content = {f.name: getattr(template, f.name) for f in dataclasses.fields(Template)}
    del content["chat"]
    return template.string if template == Template(template.string) else content


def template_from_json(value):
    """The template of spul.json. Raises ValueError if it is not one."""
    if isinstance(value, str):
        value = {"string": value}
    try:
        template = Template(**value)
        is_whole = template.string.count(TEXT) == 1
        is_whole = is_whole and isinstance(template.space, str) and isinstance(template.end, str)
    except (TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise ValueError("not a template as train.py writes it")
    return template


def with_chat(template, folder):
    """A chat template from spul.json, ready for rows of several turns if the model has it still."""
    if template.add_bos or not has_chat_template(folder):
        return template
    chat = Chat(folder, template.system)
    is_same = chat.string() == template.string
    return dataclasses.replace(template, chat=chat) if is_same else template


# ------------------------------------------------------------------------------- the chat template

# A template that asks for today's date gets this one, so that a prompt meets the same bytes later.
DATE = datetime.date(2024, 7, 26)
MARKER = "\ue000{}\ue001"  # characters of private use, which no template writes
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


class Chat:
    """The chat template of a model folder. Raises ValueError or OSError if there is none.

    system: the system message of every row that has none of its own; None: the template's default.
    """

    def __init__(self, folder, system=None):
        self.folder = Path(folder)
        self.system = system
        self.tokens = special_names(self.folder)
        self.asked_for_date = False
        self._template = self._compile(read_source(self.folder))
        padded = f" {MARKER} "  # templates that strip what is said drop these spaces
        self.strips = self._render(["user"], mark=padded) == self._render(["user"])

    def template(self, tokenizer):
        """-> the data.Template of rows with one turn. Its end is the token that ends a turn."""
        space, end = self._around_answer(tokenizer)
        return Template(
            self.string(),
            space,
            end,
            add_bos=False,
            strips=self.strips,
            system=self.system,
            date=str(DATE) if self.asked_for_date else None,
            chat=self,
        )

    def string(self):
        """The template of rows with one turn, as a string with {text}."""
        before, after = self.around(())
        around = ["".join(part for part, _ in parts) for parts in (before, after)]
        if TEXT in "".join(around):
            raise ValueError(f"{self.folder}: {TEXT} stands in its chat template or in --system")
        return TEXT.join(around)

    def around(self, turns):
        """The parts before and after the user's text, where `turns`, (role, content)s, come first.

        A part is a string, and whether it is the template's. Raises ValueError where the template
        refuses the turns, or does not show the text once.
        """
        turns = list(turns)
        is_system_ours = self.system is not None and not (turns and turns[0][0] == "system")
        if is_system_ours:
            turns.insert(0, ("system", self.system))
        rendered = self._render([*[role for role, _ in turns], "user"])
        pieces = re.split("\ue000(\\d+)\ue001", rendered)  # template, number, template, number, ...
        parts = []
        place = []
        for i, piece in enumerate(pieces):
            if i % 2 == 0:
                parts.append((piece, True))
            elif int(piece) == len(turns):
                place.append(len(parts))
            else:
                content = turns[int(piece)][1]
                is_template = is_system_ours and int(piece) == 0
                parts.append((content.strip() if self.strips else content, is_template))
        if len(place) != 1:
            raise ValueError(
                f"{self.folder}: its chat template does not show the text exactly once"
            )
        before, after = parts[: place[0]], parts[place[0] :]
        self._check_said(turns, before, after)
        return before, after

    def _check_said(self, turns, before, after):
        """Refuses turns of which the template shows something else than was said."""
        mark = MARKER.format(len(turns))
        ours = "".join(part for part, _ in [*before, (mark, False), *after])
        said = [content for _, content in turns]
        theirs = self._render([*[role for role, _ in turns], "user"], said=[*said, mark])
        if ours != theirs:
            raise ValueError(
                f"{self.folder}: its chat template changes what is said in earlier turns, or their "
                "white space: not supported"
            )

    def _around_answer(self, tokenizer):
        """What stands between the template and an answer, and after it up to a special token."""
        roles = ["user"] if self.system is None else ["system", "user"]
        before = self._render(roles)
        with_answer = self._render([*roles, "assistant"], add_generation_prompt=False)
        start = MARKER.format(len(roles))
        head, _, tail = with_answer.partition(start)
        space = head.removeprefix(before) if head.startswith(before) else ""
        return space, tokenizer.up_to_special(tail)

    def _render(self, roles, add_generation_prompt=True, mark=MARKER, said=None):
        """The conversation of these roles as a string, with a marker for what each of them says.

        said: what they say instead.
        """
        said = said or [mark.format(i) for i in range(len(roles))]
        messages = [{"role": role, "content": content} for role, content in zip(roles, said)]
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=False,  # of models that think before they answer
                tools=None,
                documents=None,
                **self.tokens,
            )
        except Exception as e:  # the template's own code can raise anything
            turns = ", ".join(roles)
            raise ValueError(f"{self.folder}: its chat template refuses {turns}: {e}") from None

    def _compile(self, source):
        """The source as a jinja2 template, with the settings that all such templates expect."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", generation_tag()],
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = self._date
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as e:
            raise ValueError(f"{self.folder}: its chat template is broken: {e}") from None

    def _date(self, form):
        self.asked_for_date = True
        return DATE.strftime(form)


def refuse(message):
    import jinja2

    raise jinja2.TemplateError(message)


def generation_tag():
    """A jinja2 extension that reads {% generation %} ... {% endgeneration %} as what is inside."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    return Generation


def read_source(folder):
    """The source of a folder's chat template. Raises FileNotFoundError if it has none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return read_text(file)
    settings = folder / "tokenizer_config.json"
    source = read_json(settings).get("chat_template") if settings.is_file() else None
    if isinstance(source, list):  # several, with names
        parts = [part for part in source if isinstance(part, dict)]
        named = {part.get("name"): part.get("template") for part in parts}
        source = named.get("default")
    if not isinstance(source, str):
        raise FileNotFoundError(
            f"{folder}: no chat template, neither in chat_template.jinja nor in "
            "tokenizer_config.json: take another --template"
        )
    return source


def has_chat_template(folder):
    try:
        return bool(read_source(Path(folder)))
    except (OSError, ValueError):
        return False


def turn_end(folder, tokenizer):
    """The id that ends a turn of the model's own chat, in a list; [] if it has no such form."""
    try:
        end = Chat(folder).template(tokenizer).end
    except (OSError, ValueError):
        return []
    return tokenizer.encode_parts([(end, True)], inside=True)[-1:]


def special_names(folder):
    """{"bos_token": "<s>", ...}, as chat templates ask for them."""
    names = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = read_json(folder / file) if (folder / file).is_file() else {}
        for name in NAMES:
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                names[name] = token
    return names
