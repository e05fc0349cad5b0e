"""Tokenizers of the kinds that cut a text differently, trained here."""

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"
TEXT = "\n".join(str(getattr(str, name).__doc__) for name in sorted(dir(str)))
LLAMA3 = (  # the pattern of Llama 3's tokenizer.json, also GPT-4's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(pattern=None, vocab_size=400):
    """Return a tokenizer of GPT-2's kind, or with another pattern."""
    made = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = pattern and pre_tokenizers.Split(Regex(pattern), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, level]) if split else level
    made.decoder = decoders.ByteLevel()
    return _trained(made, trainers.BpeTrainer, vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentence_piece():
    """Return a tokenizer that sets a mark before a text, as Llama 2's does."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _trained(made, trainers.BpeTrainer, 300)


def word_pieces():
    """Return a tokenizer of BERT's kind."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(made, trainers.WordPieceTrainer, 400)


def _trained(made, trainer, vocab_size, **settings):
    special = [END, "<unk>"]
    made.train_from_iterator(
        [TEXT], trainer(vocab_size=vocab_size, special_tokens=special, show_progress=False, **settings)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, unk_token="<unk>")


KINDS = {
    "gpt2": byte_level,
    "llama3": lambda: byte_level(LLAMA3),
    "bert": word_pieces,
    "bytes": ByT5Tokenizer,
    "llama2": sentence_piece,
}
