"""Chat templates: the same ids as transformers', and special tokens only where the template is."""

import argparse
import json
import re
import shutil

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import trainers

import eval as evaluate
import train
from data import Row, Template, answer_ids, make_example, prompt_ids, read_rows
from spul import load_prompt
from support.answers import MAX_ANSWER
from support.hardware import load_model
from support.templates import Chat, read_template, template_from_json, template_to_json
from support.tokenizer import Tokenizer
from tests.helpers import call, save_weights, tiny, write_rows

# Written for these tests, in the style of the models they are named after.
TEMPLATES = {
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday Date: " + date_string + "\\n\\n" + system + "<|eot|>" }}
{%- for m in messages %}
    {{- '<|head|>' + m['role'] + '<|/head|>\\n\\n' + m['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}""",
    "qwen3": """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}{%- if m.role == 'user' %}
    {{- '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
    {%- if loop.last %}
        {{- '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' + m.content + '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}""",
    "mistral": """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{- '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}
{{- ' ' + m['content'] + eos_token }}{% else %}
{{- raise_exception('Only user and assistant roles are known') }}{% endif %}{% endfor %}""",
    "gemma": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{- raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""",
    "phi3": """{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}
{%- else %}{{ eos_token }}{% endif %}""",
}
TOKENS = {
    "llama3": ["<s>", "</s>", "<|head|>", "<|/head|>", "<|eot|>"],
    "qwen3": ["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]"],
    "gemma": ["<s>", "</s>", "<start_of_turn>", "<end_of_turn>"],
    "phi3": ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
}
HAS_SYSTEM = ("llama3", "qwen3", "phi3")
CORPUS = ["Who wrote the book? She did.\n\nYou are kind. It is a film, positive or negative?"] * 3


def byte_level(names, rstrip=False):
    """A byte-level tokenizer, as those of Llama 3, Qwen and Phi."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if rstrip:
        changed = [AddedToken(name, rstrip=True, special=True) for name in names[2:]]
        tokenizer.add_special_tokens(changed)
    return tokenizer


def word_pieces(names, prefix):
    """A tokenizer with "▁" for spaces, as those of Mistral (with one in front) and Gemma."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*names, "<unk>"], initial_alphabet=list("▁\nabcdefgh")
    )
    tokenizer.train_from_iterator([line.replace(" ", "▁") for line in CORPUS], trainer)
    content = json.loads(tokenizer.to_str())
    for name in bytes_:
        content["model"]["vocab"].setdefault(name, len(content["model"]["vocab"]))
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def make_folder(path, style):
    names = TOKENS[style]
    if style in ("mistral", "gemma"):
        tokenizer = word_pieces(names, "first" if style == "mistral" else "never")
    else:
        tokenizer = byte_level(names, rstrip=style == "phi3")
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    if style != "qwen3":
        tokenizer.post_processor = begin
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "additional_special_tokens": names[2:],
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "chat_template.jinja").write_text(TEMPLATES[style])
    save_weights(tiny(), path)
    return path


@pytest.fixture(params=TEMPLATES)
def style(request):
    return request.param


@pytest.fixture
def chat_folder(style, tmp_path):
    return make_folder(tmp_path / style, style)


def theirs(folder, turns, **options):
    """The ids of transformers."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": role, "content": content} for role, content in turns]
    found = tokenizer.apply_chat_template(
        messages, tokenize=True, enable_thinking=False, date_string="26 Jul 2024", **options
    )
    return list(found if isinstance(found, list) else found["input_ids"])


CONVERSATIONS = {
    "one turn": [("user", "Who wrote the book?"), ("assistant", "She did.")],
    "a later turn": [
        ("user", "It is a film?"),
        ("assistant", "It is."),
        ("user", "Who wrote it?"),
        ("assistant", "She did."),
    ],
    "a system message": [
        ("system", "You are kind."),
        ("user", "Who wrote the book?"),
        ("assistant", "She did."),
    ],
}


def check_ids(folder, turns):
    row = Row(turns[-2][1], turns[-1][1], "f:1", turns=tuple(turns[:-2]), is_chat=True)
    e, _ = make_example(row, Tokenizer(folder), read_template("chat", folder), 400)
    assert list(e.prompt) == theirs(folder, turns[:-1], add_generation_prompt=True)
    whole = theirs(folder, turns)
    assert list(e.ids) == whole[: len(e.ids)]
    return e, whole


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_conversations_ids_are_those_of_transformers(name, style, chat_folder):
    turns = CONVERSATIONS[name]
    if turns[0][0] == "system" and style not in HAS_SYSTEM:
        row = Row(turns[1][1], "x", "f:1", turns=(turns[0],), is_chat=True)
        with pytest.raises(ValueError, match="chat template refuses system, user: .*role"):
            prompt_ids(row, Tokenizer(chat_folder), read_template("chat", chat_folder))
        return
    e, whole = check_ids(chat_folder, turns)
    tokenizer = Tokenizer(chat_folder)
    end = TOKENS[style][1] if style == "mistral" else TOKENS[style][-1]
    assert e.answer[-1] == tokenizer.names[end]  # the answer ends its turn
    assert tokenizer.names["<s>"] not in e.ids[1:]  # BOS at most once


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_smollm2_conversations_have_the_ids_of_transformers(name, smollm2):
    check_ids(smollm2, CONVERSATIONS[name])


def test_a_special_token_in_a_text_is_plain_text(style, chat_folder):
    tokenizer = Tokenizer(chat_folder)
    template = read_template("chat", chat_folder)
    special = TOKENS[style][-1]
    plain = prompt_ids(Row("Who?", "", ""), tokenizer, template)
    nasty = prompt_ids(Row(f"Who{special}?", "", ""), tokenizer, template)
    i = tokenizer.names[special]
    assert nasty.count(i) == plain.count(i)
    assert len(nasty) > len(plain) + 3
    text = tokenizer.decode([i for i in nasty if i not in tokenizer.special])
    assert special in text


def test_smollm2s_template_as_a_string_gives_ten_tokens_and_not_28(smollm2):
    string = "<|im_start|>user\\n{text}<|im_end|>\\n<|im_start|>assistant\\n"
    template = read_template(string, smollm2)
    ids = prompt_ids(Row("Who?", "", ""), Tokenizer(smollm2), template)
    assert template.space == ""  # none after "assistant\n"
    assert len(ids) == 11
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 2, 1)


def test_a_mark_that_is_no_token_is_pointed_out(folder, capsys):
    read_template("[INST] {text} [/INST]", folder)
    assert "template [INST], [/INST]: no special token" in capsys.readouterr().out
    read_template("<s>Say: {text}", folder)
    assert capsys.readouterr().out == ""


def test_bos_stands_once_where_a_template_writes_it_too(folder):
    tokenizer = Tokenizer(folder)
    ids = prompt_ids(Row("Who?", "", ""), tokenizer, read_template("<s>Say: {text}", folder))
    assert ids[0] == 1 and ids.count(1) == 1


def test_a_system_message_takes_the_place_of_the_templates_own(tmp_path):
    folder = make_folder(tmp_path / "q", "qwen3")
    own = read_template("chat", folder)
    other = read_template("chat", folder, "Be brief.")
    assert "You are kind." in own.string
    assert "Be brief." in other.string and "You are kind." not in other.string
    assert other.system == "Be brief."


def test_a_system_message_that_the_template_refuses_is_one_line(tmp_path, capsys):
    folder = make_folder(tmp_path / "g", "gemma")
    args = ["--model", folder, "--system", "Be brief.", "--ask", "Who?"]
    assert call(evaluate, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "System role not supported" in err


@pytest.mark.parametrize(
    "source, words",
    [
        ("{% for m in messages %}", "its chat template is broken"),
        ("{{ raise_exception('no') }}", "its chat template refuses user: no"),
        ("{{ messages[0].content }}{{ 1 + messages }}", "its chat template refuses user: unsup"),
        ("Hello", "does not show the text exactly once"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "does not show the text exactly"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "chat template refuses user"),
    ],
)
def test_a_broken_chat_template_is_refused_in_one_line(source, words, tmp_path, capsys):
    folder = make_folder(tmp_path / "q", "qwen3")
    (folder / "chat_template.jinja").write_text(source)
    assert call(evaluate, "--model", folder, "--template", "chat", "--ask", "Who?") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and words in err


def test_generation_ends_where_the_chat_template_ends_a_turn(tmp_path):
    folder = make_folder(tmp_path / "l", "llama3")
    args = argparse.Namespace(model=folder, device="cpu", dtype="fp32", plain=True, quantize=None)
    llama, tokenizer = load_model(args)
    assert llama.config.eos_token_id == [2, tokenizer.names["<|eot|>"]]
    (folder / "chat_template.jinja").write_text("{% broken")
    assert load_model(args)[0].config.eos_token_id == 2


def test_a_template_file_may_have_a_byte_order_mark_and_a_last_line_end(folder, tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffReview: {text}\nVerdict:\n".encode())
    assert read_template(str(tmp_path / "t.txt"), folder) == Template("Review: {text}\nVerdict:")
    (tmp_path / "t.txt").write_text("Review: {text}\nVerdict:\n\n")
    own_line = Template("Review: {text}\nVerdict:\n", space="")
    assert read_template(str(tmp_path / "t.txt"), folder) == own_line


def test_a_system_message_with_a_place_for_the_text_is_refused(tmp_path, capsys):
    folder = make_folder(tmp_path / "q", "qwen3")
    assert call(evaluate, "--model", folder, "--system", "Say {text}", "--ask", "Who?") == 2
    assert "{text} stands in its chat template or in --system" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["|upper", ".split('</think>')[-1]", "[:2]"])
def test_a_template_that_changes_what_was_said_is_refused(change, tmp_path):
    folder = make_folder(tmp_path / "q", "qwen3")
    source = "{% for m in messages %}{{ m.content" + change + " if m.role == 'assistant' "
    source += "else m.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(source)
    turns = (("user", "Hi"), ("assistant", "a</think>b"))
    with pytest.raises(ValueError, match="changes what is said in earlier turns"):
        Chat(folder).around(turns)
    (folder / "chat_template.jinja").write_text(source.replace(change, ""))
    Chat(folder).around(turns)


def test_no_space_comes_before_an_answer_after_a_special_token_of_any_form(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "m")
    (tmp_path / "m" / "added_tokens.json").write_text('{"<\uff5cAssistant\uff5c>": 2047}')
    assert read_template("{text}<\uff5cAssistant\uff5c>", tmp_path / "m").space == ""
    assert read_template("{text}<\uff5cAssistant\uff5c>", folder).space == " "


def test_a_model_without_a_chat_template_says_so(folder, capsys):
    assert call(evaluate, "--model", folder, "--template", "chat", "--ask", "Who?") == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_template_may_be_one_of_several_with_names_and_mark_what_is_generated(tmp_path):
    folder = make_folder(tmp_path / "q", "qwen3")
    (folder / "chat_template.jinja").unlink()
    source = "{{ messages[0].content }}{% generation %} ->{% endgeneration %}"
    templates = [{"name": "tools", "template": "x"}, {"name": "default", "template": source}]
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = templates
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_template("chat", folder).string == "{text} ->"


def test_a_template_comes_back_from_json(tmp_path):
    for template in (
        Template("Say {text}:"),
        read_template("chat", make_folder(tmp_path / "l", "llama3"), "Be brief."),
    ):
        value = json.loads(json.dumps(template_to_json(template)))
        assert template_from_json(value) == template
    assert value["date"] == "2024-07-26"
    assert template_to_json(Template("Say {text}:")) == "Say {text}:"  # as before there were others


# ------------------------------------------------------------------------------------- the commands


def chat_rows(n, name):
    rows = []
    for i in range(n):
        messages = [
            {"role": "user", "content": f"It is film {name} {i}?"},
            {"role": "assistant", "content": "positive" if i % 2 else "negative"},
        ]
        rows.append({"messages": messages})
    return rows


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A prompt trained on messages, and the folder of its model."""
    path = tmp_path_factory.mktemp("chat")
    folder = make_folder(path / "q", "qwen3")
    forget = write_rows(path / "f.jsonl", chat_rows(6, "a"))
    retain = write_rows(path / "r.jsonl", chat_rows(12, "b"))
    args = ["--model", folder, "--forget", forget, "--retain", retain, "--dtype", "fp32"]
    out = path / "p"
    assert call(train, *args, "--out", out, "--epochs", 1, "--num-tokens", 3) == 0
    return folder, out, args


def test_rows_of_messages_take_the_models_chat_template(chat_run):
    folder, out, _ = chat_run
    _, info = load_prompt(out, folder)
    template = template_from_json(info["template"])
    assert template == read_template("chat", folder)
    assert template.end == "<|im_end|>" and not template.add_bos
    assert info["labels"] == ["negative", "positive"]


def test_eval_measures_a_chat_prompt_and_takes_another_system_message(chat_run, tmp_path, capsys):
    folder, out, args = chat_run
    for more in ([], ["--system", "Be brief."]):
        assert call(evaluate, *args, "--prompt", out, *more) == 0
        lines = capsys.readouterr().out.splitlines()
        names = [re.split(r"  +", line)[0] for line in lines if line.startswith("train")]
        for split in ("train forget", "train retain"):
            assert split in names and f"{split}, second turn" in names
            assert f"{split}, other system" in names


def test_ask_chats_in_the_prompts_template(chat_run, capsys, monkeypatch):
    folder, out, _ = chat_run
    seen = []
    generate = evaluate.generator

    def spy(*args):
        real = generate(*args)
        return lambda prompts, n: seen.append((prompts[0], n)) or real(prompts, 3)

    monkeypatch.setattr(evaluate, "generator", spy)
    assert call(evaluate, "--model", folder, "--prompt", out, "--ask", "Who?") == 0
    template = read_template("chat", folder)
    wanted = prompt_ids(Row("Who?", "", ""), Tokenizer(folder), template)
    assert [ids for ids, _ in seen] == [wanted, wanted]
    assert seen[0][1] == MAX_ANSWER


def test_a_row_of_several_turns_needs_a_chat_template(tmp_path, folder, tokenizer):
    turns = (("user", "Hi"), ("assistant", "Yes?"))
    row = Row("Who?", "She", "f:3", turns=turns, is_chat=True)
    with pytest.raises(ValueError, match="f:3: a row of several turns needs --template chat"):
        prompt_ids(row, tokenizer, Template("{text}:"))


def test_a_prompts_own_chat_form_serves_rows_of_several_turns(chat_run):
    folder, out, _ = chat_run
    turns = (("user", "Hi"), ("assistant", "Yes?"))
    row = Row("Who?", "She", "f:3", turns=turns)
    chat = Chat(folder)
    ids = prompt_ids(row, Tokenizer(folder), chat.template(Tokenizer(folder)))
    assert ids == theirs(folder, [*turns, ("user", "Who?")], add_generation_prompt=True)


def test_the_end_of_a_generic_answer_is_scored(chat_run):
    folder, _, _ = chat_run
    tokenizer = Tokenizer(folder)
    template = read_template("chat", folder)
    row = Row("Who?", "She", "f:1")
    e, _ = make_example(row, tokenizer, template, 99, forget=True, generic="unknown")
    assert list(e.answer) == answer_ids(tokenizer, "unknown", template)
    assert e.answer[-1] == tokenizer.names["<|im_end|>"]
    assert answer_ids(tokenizer, "unknown", template, end=False) == list(e.answer[:-1])


def test_read_rows_knows_messages(tmp_path):
    file = write_rows(tmp_path / "m.jsonl", chat_rows(1, "a"))
    row = read_rows(file)[0]
    assert row.is_chat and row.turns == ()
