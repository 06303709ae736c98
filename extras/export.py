"""Hand a prompt on to servers and to other tools.

    python -m extras.export --model DIR --prompt DIR --as vocabulary --out DIR
    python -m extras.export --model DIR --prompt DIR --as gguf --out DIR
    python -m extras.export --model DIR --prompt DIR --as kv --out DIR

vocabulary: a model folder in which the prompt's vectors are the embeddings of p new tokens,
<|spul_0|>, <|spul_1|>, ... They stand before every text, also before BOS: the chat template and
tokenizer.json put them there. So it works in every server that reads such folders. All other
weights are the same bytes. The model's head is no longer its embedding: the new tokens have rows of
their own there, which keep them from ever being said.

gguf: the same, for llama.cpp's convert_hf_to_gguf.py. It knows a tokenizer by the ids of a text, so
tokenizer.json puts nothing new before texts; the chat template does. No server adds BOS.

kv: the prompt's keys and values in each layer, as a folder of peft's PREFIX_TUNING, for servers and
people that keep such a cache.

--prompt several times: the prompts one after the other, as in eval.py.

Letters: p prompt tokens, d width, V rows of the table, L layers, G heads of keys and values, c
width of a head, N positions.
"""

import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data import Template, TEXT, read_rows
from eval import load_prompts
from extras.finetune import belongs_to_tokenizer
from spul import answer_hidden
from support.cli import Parser, check_required, non_empty, run
from support.elsewhere import BY_PEOPLE
from support.files import check_not_inside_file, read_json, read_text, weight_files, write_json
from support.files import write_tensors, write_text
from support.general import own_form, text_examples
from support.hardware import compare_dtypes, load_llama, read_config
from support.templates import Chat, has_chat_template
from support.tokenizer import Tokenizer

NAME = "<|spul_{}|>"
EXPORT = "spul_export.json"  # what was put into an exported folder
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
NEVER = -100.0  # the logit of a new token; others have about 20
RIDGE = 1e-3
INDEX = "model.safetensors.index.json"


# ------------------------------------------------------------------------------------- vocabulary


def export_vocabulary(folder, prompts, out, is_gguf=False):
    """Write the model of `folder` with the prompts in its vocabulary to `out`.

    is_gguf: tokenizer.json does not put it before texts. Raises ValueError or OSError where that
    cannot be; then there is no folder `out`.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = Tokenizer(folder)
    first = check_vocabulary(folder, tokenizer, config)  # before a prompt is said not to fit
    phi, info = load_prompts(prompts, config, folder)
    names = [NAME.format(i) for i in range(len(phi))]
    size = max(config.vocab_size, first + len(phi))
    silent = silent_row(folder, tokenizer, phi)  # (d,)
    with whole_folder(out) as new:
        write_weights(folder, new, config, phi, silent, first, size)
        copy_small_files(folder, new)
        settings = read_json(folder / "config.json")
        settings |= {"vocab_size": size, "tie_word_embeddings": False}
        write_json(new / "config.json", settings)
        write_tokenizer(folder, new, tokenizer, names, first, is_gguf)
        export = {
            "format": "spul vocabulary 1",
            "prefix": "".join([*names, *bos_names(tokenizer)]),
            "ids": [first, first + len(phi) - 1],
            "base_sha256": info["base_sha256"],
            "template": info["template"],
            "generic": info["generic"],
        }
        write_json(new / EXPORT, export)
        check_ids(folder, new, tokenizer, names, first, is_gguf)
    return export


def check_vocabulary(folder, tokenizer, config):
    """The id of the first new token. Raises ValueError for a folder that cannot take any."""
    if (folder / EXPORT).exists() or NAME.format(0) in tokenizer.names:
        raise ValueError(
            f"{folder}: its vocabulary holds a prompt already ({NAME.format(0)}): export into the "
            "model that the prompt was trained for"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder}: no tokenizer.json, and a sentencepiece model takes no new tokens. Make one "
            "with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    if tokenizer.count > config.vocab_size:
        raise ValueError(
            f"{folder}: a tokenizer of {tokenizer.count} ids and a table of {config.vocab_size} "
            "rows do not belong together"
        )
    return tokenizer.count


@torch.no_grad()
def silent_row(folder, tokenizer, phi):
    """A row of the head, (d,), whose token is never said: its logit is about NEVER everywhere.

    What the final norm puts out has much in common at all positions, so a ridge regression finds a
    direction along which all outputs are nearly the same. It is fitted on some texts after phi.
    (A copy of an unused token's row does not do: SmolLM2 says such tokens once in 600 times.)
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_bf16, _ = compare_dtypes(device)
    model = load_llama(folder, torch.bfloat16 if is_bf16 else torch.float32, device)
    rows = read_rows(BY_PEOPLE)
    limit = model.config.max_position_embeddings - len(phi)
    examples = []
    for form in (own_form(folder, tokenizer), Template(TEXT)):
        examples += text_examples(rows, tokenizer, form, limit)
    phi = phi.to(device)
    hidden = torch.cat(answer_hidden(model, examples, phi, batch_size=8))  # (N, d)
    hidden = hidden.cpu().double() / model.config.logits_scaling
    gram = hidden.T @ hidden  # (d, d)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    row = torch.linalg.solve(gram, hidden.sum(dim=0)) * NEVER  # (d,)
    if (hidden @ row).max() > NEVER / 2:
        raise ValueError(
            f"{folder}: its outputs have too little in common for tokens that it never says"
        )
    return row


def write_weights(folder, new, config, phi, silent, first, size):
    """The weight files again, with phi in the embedding and rows of its own in the head."""
    needed = sum(file.stat().st_size for file in weight_files(folder))
    needed += 4 * (config.vocab_size + 2 * len(phi)) * config.hidden_size
    free = shutil.disk_usage(new).free
    if free < needed:
        raise OSError(f"{new.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} are free")
    is_tied = config.tie_word_embeddings
    silent = silent.expand(len(phi), -1)  # (p, d)
    placed = {}  # {tensor: file}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
            metadata = f.metadata()
        tables = [name for name in names if name.endswith((EMBEDDING, HEAD))]
        if tables:
            tensors = load_file(file)
            old = {name: tensors.pop(name) for name in tables}
            for name, table in old.items():
                if name.endswith(EMBEDDING):
                    tensors[name] = with_rows(table, phi, first, size)
                if name.endswith(EMBEDDING if is_tied else HEAD):
                    tensors[HEAD] = with_rows(table, silent, first, size)
            write_tensors(new / file.name, tensors, metadata)
            names = list(tensors)
        else:
            shutil.copyfile(file, new / file.name)
        placed |= dict.fromkeys(names, file.name)
    if (folder / INDEX).exists() and not (folder / "model.safetensors").exists():
        total = sum((new / name).stat().st_size for name in set(placed.values()))
        write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def with_rows(table, rows, first, size):
    """The table (V, d) -> (size, d), with rows (p, d) at `first`; rows that no token has are 0."""
    new = table.new_zeros(size, table.shape[1])
    new[: len(table)] = table
    new[first : first + len(rows)] = rows.to(table.dtype)
    return new


def copy_small_files(folder, new):
    """All else that lies in the folder: settings, licences. What is written anew comes later."""
    for file in folder.iterdir():
        is_sentencepiece = file.suffix == ".model"  # takes no new tokens
        if file.is_file() and belongs_to_tokenizer(file.name) and not is_sentencepiece:
            shutil.copyfile(file, new / file.name)


# -------------------------------------------------------------------------------------- tokenizer


def write_tokenizer(folder, new, tokenizer, names, first, is_gguf):
    """tokenizer.json with the new tokens, which it puts before every text, and its settings."""
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = content.get("added_tokens") or []
    added = [{"id": first + i, "content": name} | AS_SPECIAL for i, name in enumerate(names)]
    content["added_tokens"] += added
    before = [*names, *bos_names(tokenizer)]
    ids = {name: first + i for i, name in enumerate(names)} | tokenizer.names
    if not is_gguf:
        content["post_processor"] = putting_first(content.get("post_processor"), before, ids)
    write_json(new / "tokenizer.json", content)

    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    settings.pop("add_bos_token", None)  # with these transformers builds a post-processor anew
    settings.pop("add_eos_token", None)
    if is_gguf:
        settings["add_bos_token"] = False
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # reads tokenizer.json as it is
    if settings.get("added_tokens_decoder"):
        for token in added:
            token = dict(token)
            settings["added_tokens_decoder"][str(token.pop("id"))] = token
    write_chat_templates(folder, new, settings, "".join(names))
    write_json(new / "tokenizer_config.json", settings)


def bos_names(tokenizer):
    by_id = {i: name for name, i in tokenizer.names.items()}
    return [by_id[i] for i in tokenizer.bos]


AS_SPECIAL = {
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
}


def putting_first(processor, before, ids):
    """A post-processor of tokenizer.json that puts the tokens `before` before every text.

    processor: the old one, or None. What it puts after a text stays. ids: {name: id}.
    """
    parts = [processor] if processor else []
    if processor and processor["type"] == "Sequence":
        parts = list(processor["processors"])
    single = [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    special = {}
    for part in [part for part in parts if part["type"] == "TemplateProcessing"]:
        single, pair = from_text(part["single"]), from_text(part["pair"])
        special = part["special_tokens"]
        parts.remove(part)
    if any(part["type"] != "ByteLevel" for part in parts):
        kinds = ", ".join(part["type"] for part in parts)
        raise ValueError(f"tokenizer.json: its post-processor {kinds} is not supported")
    first = [{"SpecialToken": {"id": name, "type_id": 0}} for name in before]
    special = special | {
        name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in before
    }
    template = {
        "type": "TemplateProcessing",
        "single": first + single,
        "pair": first + pair,
        "special_tokens": special,
    }
    return {"type": "Sequence", "processors": [*parts, template]} if parts else template


def from_text(pieces):
    """A template's pieces from the first text on."""
    is_text = ["Sequence" in piece for piece in pieces]
    return pieces[is_text.index(True) :]


def write_chat_templates(folder, new, settings, prefix):
    """The folder's chat templates, in files and in settings, with the prefix before all else."""
    files = [folder / "chat_template.jinja", *folder.glob("additional_chat_templates/*.jinja")]
    for file in files:
        if file.is_file():
            place = new / file.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            write_text(place, prefix + read_text(file))
    template = settings.get("chat_template")
    if isinstance(template, str):
        settings["chat_template"] = prefix + template
    elif isinstance(template, list):  # several, with names
        for part in template:
            part["template"] = prefix + part["template"]


def check_ids(folder, new, tokenizer, names, first, is_gguf):
    """Raises ValueError unless the new folder reads texts as the old one, after the new tokens."""
    exported = Tokenizer(new)
    ids = list(range(first, first + len(names)))
    texts = [row.text for row in read_rows(BY_PEOPLE)]
    prefix = "".join(names)
    is_same = exported.bos == ([] if is_gguf else ids + tokenizer.bos)
    is_same = is_same and [exported.names.get(name) for name in names] == ids
    is_same = is_same and all(exported.encode(text) == tokenizer.encode(text) for text in texts)
    if is_same and has_chat_template(folder):
        before, after = Chat(folder).string().split(TEXT)
        is_same = Chat(new).string() == prefix + before + TEXT + after
        for text in texts:
            parts = [(before, True), (text, False), (after, True)]
            now = exported.encode_parts([(prefix, True), *parts])
            is_same = is_same and now == ids + tokenizer.encode_parts(parts)
    if not is_same:
        raise ValueError(f"{folder}: after new tokens its tokenizer gives texts other ids")


# --------------------------------------------------------------------------------------------- kv


@torch.no_grad()
def export_kv(folder, prompts, out):
    """Write the prompts' keys and values in the model of `folder` to `out`, for peft."""
    phi, info = load_prompts(prompts, read_config(folder), folder)  # (p, d)
    model = load_llama(folder, None, "cpu", plain=True)
    cache = model.prefix(phi)  # for each layer keys and values (1, G, p, c)
    both = torch.stack([torch.cat(layer) for layer in cache])  # (L, 2, G, p, c)
    G, p, c = both.shape[2:]
    embeddings = both.permute(3, 0, 1, 2, 4).reshape(p, -1)  # (p, L 2 G c)
    settings = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": p,
        "token_dim": G * c,
        "num_transformer_submodules": 1,
        "num_attention_heads": G,
        "num_layers": len(cache),
        "encoder_hidden_size": G * c,
        "prefix_projection": False,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
        "base_model_name_or_path": info["model"],
    }
    with whole_folder(out) as new:
        tensors = {"prompt_embeddings": embeddings.float().contiguous()}
        write_tensors(new / "adapter_model.safetensors", tensors)
        write_json(new / "adapter_config.json", settings)
    return settings


# ------------------------------------------------------------------------------------ the command


@contextmanager
def whole_folder(out):
    """Yield a new folder that becomes `out` at the end; if anything fails, nothing is left."""
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    new = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(new, ignore_errors=True)  # what a kill left
    new.mkdir()
    try:
        yield new
        new.rename(out)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def main(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--model", type=non_empty, metavar="DIR", help="the model of the prompt's training")
    add("--prompt", type=non_empty, action="append", metavar="DIR",
        help="the folder that train.py wrote; several times for prompts one after the other")
    add("--as", dest="form", choices=["vocabulary", "gguf", "kv"], default="vocabulary",
        help="a model folder with the prompt in its vocabulary (default), the same to be converted "
        "to GGUF, or keys and values")
    add("--out", type=non_empty, metavar="DIR", help="the new folder")
    args = parser.parse_args(argv)
    check_required(args, "model", "prompt", "out")
    check_not_inside_file("--out", args.out)
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out} is there already")
    if args.form == "kv":
        settings = export_kv(args.model, args.prompt, args.out)
        print(
            f"{args.out}: {settings['num_virtual_tokens']} keys and values in each of "
            f"{settings['num_layers']} layers: peft.PeftModel.from_pretrained(model, DIR)"
        )
        return
    is_gguf = args.form == "gguf"
    export = export_vocabulary(args.model, args.prompt, args.out, is_gguf)
    first, last = export["ids"]
    print(f"{args.out}: a model with {last - first + 1} new tokens, {first} to {last}")
    if has_chat_template(args.out):
        print("chat     the chat template puts them first")
    where = "" if is_gguf else "tokenizer.json puts them first; where a server ignores that, "
    print(f"text     {where}each text begins with the string `prefix` of {EXPORT}")


if __name__ == "__main__":
    run(main)
