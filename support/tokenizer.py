"""A model folder's tokenizer: tokenizer.model (sentencepiece), else tokenizer.json (tokenizers)."""

from pathlib import Path

from support.files import read_json


class Tokenizer:
    """Text to ids and back. Raises ValueError or OSError if the folder has no tokenizer that works.

    Special-token strings in user text are encoded as ordinary text, except tokens that
    tokenizer.json adds without special=true.

    bos: the ids that come before every text, a list of one or none
    size: vocabulary size without added tokens
    special: the ids that stand for no text
    encode, decode: text -> list of ids, and back
    """

    def __init__(self, folder):
        folder = Path(folder)
        if (folder / "tokenizer.model").is_file():
            self._load_sentencepiece(folder)
        elif (folder / "tokenizer.json").is_file():
            self._load_tokenizers(folder / "tokenizer.json")
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer.model and no tokenizer.json")
        self._anchor = self.encode("\n")

    def _load_sentencepiece(self, folder):
        from sentencepiece import SentencePieceProcessor

        file = folder / "tokenizer.model"
        try:
            pieces = SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as e:
            raise ValueError(f"{file}: not a sentencepiece model: {e}") from None
        settings = folder / "tokenizer_config.json"
        add_bos = True
        if settings.is_file():
            add_bos = read_json(settings).get("add_bos_token") in (True, None)
        self.bos = [pieces.bos_id()] if add_bos and pieces.bos_id() >= 0 else []
        self.size = pieces.get_piece_size()
        self.encode = pieces.encode
        # A model's table may be longer than the tokenizer's.
        self.decode = lambda ids: pieces.decode([i for i in ids if i < self.size])
        tests = (pieces.is_control, pieces.is_unknown, pieces.is_unused, pieces.is_byte)
        self.special = {i for i in range(self.size) if any(test(i) for test in tests)}

    def _load_tokenizers(self, file):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{file}: to read it, pip install tokenizers") from None
        try:
            bpe = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the package raises bare Exception
            raise ValueError(f"{file}: not a tokenizer of the package tokenizers: {e}") from None
        bpe.encode_special_tokens = True  # "<|endoftext|>" in a review is text, not the end of it
        bpe.no_truncation()
        bpe.no_padding()
        plain = bpe.encode("a", add_special_tokens=False).ids
        framed = bpe.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(framed)) if framed[i : i + len(plain)] == plain)
        self.bos = framed[: next(starts)]
        self.size = bpe.get_vocab_size(with_added_tokens=False)
        self.encode = lambda text: bpe.encode(text, add_special_tokens=False).ids
        self.decode = bpe.decode
        added = bpe.get_added_tokens_decoder()
        self.special = {i for i, token in added.items() if token.special}

    def encode_inside(self, text):
        """The ids of text that comes after other text: without sentencepiece's leading space."""
        ids = self.encode("\n" + text)
        n = len(self._anchor)
        if ids[:n] == self._anchor:
            return ids[n:]
        return self.encode(text)
