"""A model folder's tokenizer: tokenizer.model (sentencepiece), else tokenizer.json (tokenizers)."""

import hashlib
import json
import re
from pathlib import Path

from support.files import read_json

# What a tokenizer makes of this is part of its digest: spaces, digits, accents, other scripts.
PROBE = "A film's 1,234 scenes:\n\n  naïve Αθήνα 電影 🎬\tdef f(x):"


class Tokenizer:
    """Text to ids and back. Raises ValueError or OSError if the folder has no tokenizer that works.

    Strings like "<|im_end|>" in a row's text are encoded as ordinary text, except tokens that
    tokenizer.json adds without special=true. In a template they are the special tokens they name.

    bos: the ids that come before every text, a list of one or none
    size: vocabulary size without added tokens
    special: the ids that stand for no text
    names: {"<|im_end|>": its id, ...}, what counts as a special token in a template
    count: one more than the largest id
    table: rows of the model's table, to be set by who knows the model; ids beyond are refused
    encode, decode: text -> list of ids, and back
    """

    def __init__(self, folder):
        folder = Path(folder)
        self.table = None
        settings = folder / "tokenizer_config.json"
        settings = read_json(settings) if settings.is_file() else {}
        self._encode_special = None  # a template, with the package's own rules for special tokens
        pieces = self._read_sentencepiece(folder)
        if pieces:
            self._use_sentencepiece(pieces, settings, folder)
        elif (folder / "tokenizer.json").is_file():
            self._use_tokenizers(folder / "tokenizer.json", settings)
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer.model and no tokenizer.json")
        self.count = 1 + max(self.size - 1, *self.names.values(), -1)
        self._anchor = self.encode("\n")

    def _read_sentencepiece(self, folder):
        """The sentencepiece model, or None where the folder has none, or has a tokenizer.json too.

        Llama 3's tokenizer.model is a list of tiktoken's, and a tokenizer.json lies beside it.
        """
        file = folder / "tokenizer.model"
        if not file.is_file():
            return None
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as e:
            if (folder / "tokenizer.json").is_file():
                return None
            raise ValueError(
                f"{file}: not a sentencepiece model ({e}): the model's tokenizer.json is needed"
            ) from None

    def _use_sentencepiece(self, pieces, settings, folder):
        add_bos = settings.get("add_bos_token") in (True, None)
        self.bos = [pieces.bos_id()] if add_bos and pieces.bos_id() >= 0 else []
        self.size = pieces.get_piece_size()
        self.encode = pieces.encode
        # A model's table may be longer than the tokenizer's.
        self.decode = lambda ids: pieces.decode([i for i in ids if i < self.size])
        tests = (pieces.is_control, pieces.is_unknown, pieces.is_unused, pieces.is_byte)
        self.special = {i for i in range(self.size) if any(test(i) for test in tests)}
        controls = [i for i in range(self.size) if pieces.is_control(i)]
        self.names = {pieces.id_to_piece(i): i for i in controls} | added_tokens(folder, settings)
        self._pattern = pattern_of({name: (False, False) for name in self.names})
        self._words = [pieces.id_to_piece(i) for i in range(self.size)]

    def _use_tokenizers(self, file, settings):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{file}: to read it, pip install tokenizers") from None
        try:
            bpe = tokenizers.Tokenizer.from_file(str(file))
            with_special = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the package raises bare Exception
            raise ValueError(f"{file}: not a tokenizer of the package tokenizers: {e}") from None
        bpe.encode_special_tokens = True  # "<|endoftext|>" in a review is text, not the end of it
        for each in (bpe, with_special):
            each.no_truncation()
            each.no_padding()
        self.bos = bos_of(read_json(file), settings, bpe)
        self.size = bpe.get_vocab_size(with_added_tokens=False)
        self.encode = lambda text: bpe.encode(text, add_special_tokens=False).ids
        self.decode = bpe.decode
        self._encode_special = lambda text: with_special.encode(text, add_special_tokens=False).ids
        added = bpe.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}
        self.names = {added[i].content: i for i in sorted(self.special)}
        self._pattern = pattern_of(
            {added[i].content: (added[i].lstrip, added[i].rstrip) for i in self.special}
        )
        self._words = sorted(bpe.get_vocab(with_added_tokens=True).items())

    def encode_inside(self, text):
        """The ids of text that comes after other text: without sentencepiece's leading space."""
        ids = self.encode("\n" + text)
        n = len(self._anchor)
        if ids[:n] == self._anchor:
            return ids[n:]
        return self.encode(text)

    def encode_parts(self, parts, inside=False):
        """The ids of (string, is_template) parts, one after the other.

        The names of special tokens count in a template's parts and nowhere else. inside: other
        text comes before.
        """
        whole = "".join(string for string, _ in parts)
        encode = self.encode_inside if inside else self.encode
        if not any(is_template and self._finds(string) for string, is_template in parts):
            return encode(whole)
        is_content_plain = not any(self._finds(s) for s, is_template in parts if not is_template)
        if self._encode_special and is_content_plain and not inside:
            return self._encode_special(whole)
        ids = []
        for i, piece in enumerate(self._runs(parts)):
            if i % 2:
                name = piece if piece in self.names else piece.strip()
                ids.append(self.names[name])
            elif piece:
                ids += encode(piece)
                encode = self.encode_inside
        return ids

    def _finds(self, string):
        return self._pattern.search(string)

    def _runs(self, parts):
        """Parts as text, special token, text, special token, ..., text."""
        runs = [""]
        for string, is_template in parts:
            first, *rest = self._pattern.split(string) if is_template else [string]
            runs[-1] += first
            runs += rest
        return runs

    def up_to_special(self, string):
        """The string up to its first special token and with it; "" if it has none."""
        found = self._pattern.search(string)
        return string[: found.end()].rstrip() if found else ""

    def digest(self):
        """A hex digest of what the tokenizer does: its words, and the ids of a sample text."""
        content = [self._words, sorted(self.names.items()), self.bos, self.encode(PROBE)]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def check_table(self, ids, where):
        """Refuses an id that the model has no row for: tokens were added, its table was not."""
        largest = max(ids, default=0)
        if self.table is not None and largest >= self.table:
            names = [name for name, i in self.names.items() if i == largest]
            token = names[0] if names else self.decode([largest])
            raise ValueError(
                f"{where}: the tokenizer gives {token!r} the id {largest}, and the model's table "
                f"has {self.table} rows: the token was added without resize_token_embeddings"
            )


def pattern_of(names):
    """A pattern that finds special tokens, {name: (strips before it, strips after it)}."""
    options = []
    for name in sorted(names, key=len, reverse=True):
        before, after = names[name]
        options.append(r"\s*" * before + re.escape(name) + r"\s*" * after)
    return re.compile("(" + ("|".join(options) or r"(?!)") + ")")


def added_tokens(folder, settings):
    """{name: id} of the tokens that files beside a sentencepiece model add."""
    names = {}
    file = folder / "added_tokens.json"
    try:
        if file.is_file():
            names = {name: int(i) for name, i in read_json(file).items()}
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            names[token["content"]] = int(i)
    except (TypeError, KeyError, AttributeError, ValueError) as e:
        raise ValueError(f"{folder}: its added tokens are not names with ids: {e}") from None
    return names


def bos_of(content, settings, bpe):
    """The ids before every text, as a tokenizer's settings say; content: of tokenizer.json."""
    add_bos = settings.get("add_bos_token")
    name = settings.get("bos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if add_bos is False:
        return []
    if add_bos and name and bpe.token_to_id(name) is not None:
        return [bpe.token_to_id(name)]
    processor = content.get("post_processor") or {}
    ids = []
    for part in processor.get("processors", [processor]):
        if part.get("type") != "TemplateProcessing":
            continue
        for piece in part["single"]:
            if "Sequence" in piece:  # what comes after is an end, not a beginning
                break
            ids += part["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return ids
