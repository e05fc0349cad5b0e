"""Folders of tiny models with random weights, as transformers writes them, without the weights."""

import inspect

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    BartConfig,
    BertConfig,
    ByT5Tokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
)

TEXT = "\n".join(str(getattr(str, name).__doc__) for name in sorted(dir(str)))
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4, as RoBERTa's and BART's
VOCABULARY = 320

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
WORDS = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
BART = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
BART |= {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 2}


def bpe_tokenizer(around=""):
    """Return a byte-level tokenizer trained on TEXT that puts a template such as "<s> $A </s>" around a text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([TEXT], trainer)
    if around:
        ids = [(token, SPECIALS.index(token)) for token in around.split() if token in SPECIALS]
        trained.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    names = zip(("bos", "pad", "eos", "unk", "mask"), SPECIALS, strict=True)
    return PreTrainedTokenizerFast(tokenizer_object=trained, **{f"{name}_token": token for name, token in names})


class WordPieces:
    """BERT's kind of tokenizer, that is one file."""

    def save_pretrained(self, folder):
        words = sorted({word.strip(".,()'`\"").lower() for word in TEXT.split()} - {""})
        letters = [f"{ahead}{chr(i)}" for i in range(33, 127) for ahead in ("", "##")]
        known = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words])
        (folder / "vocab.txt").write_text("\n".join(known))


TEXT_MODELS = {
    "LlamaForCausalLM": (LlamaConfig(**SMALL, **WORDS, **TOKENS), bpe_tokenizer("<s> $A")),
    "GPT2LMHeadModel": (
        GPT2Config(**TOKENS, vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2),
        bpe_tokenizer(),
    ),
    "GPTNeoXForCausalLM": (GPTNeoXConfig(**SMALL, **WORDS), bpe_tokenizer()),
    "OPTForCausalLM": (
        OPTConfig(
            **WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
        ),
        bpe_tokenizer("</s> $A"),
    ),
    "T5ForConditionalGeneration": (
        T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0),
        ByT5Tokenizer(),
    ),
    "BartForConditionalGeneration": (BartConfig(**WORDS, **TOKENS, **BART), bpe_tokenizer("<s> $A </s>")),
    "BertForMaskedLM": (BertConfig(**SMALL, vocab_size=600, max_position_embeddings=64), WordPieces()),
    "BertModel": (BertConfig(**SMALL, vocab_size=600, max_position_embeddings=64), WordPieces()),
    "RobertaForMaskedLM": (
        RobertaConfig(**SMALL, **TOKENS, vocab_size=VOCABULARY, max_position_embeddings=66),
        bpe_tokenizer("<s> $A </s>"),
    ),
}

MEDIA_MODELS = {
    "ViTForImageClassification": (
        ViTConfig(**SMALL, image_size=8, patch_size=4),
        ViTImageProcessor(size={"height": 8, "width": 8}),
    ),
    "WhisperForConditionalGeneration": (
        WhisperConfig(
            **BART | {"decoder_start_token_id": 0},
            **TOKENS,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=50,
            max_target_positions=16,
        ),
        WhisperFeatureExtractor(feature_size=8, chunk_length=1),
    ),
    "Wav2Vec2ForCTC": (
        Wav2Vec2Config(**SMALL, vocab_size=32, conv_dim=(8, 8), conv_stride=(20, 16), conv_kernel=(20, 16)),
        Wav2Vec2FeatureExtractor(),
    ),
}


def write_folder(folder, name):
    """Write the folder of one of these models, and return its config as it is read from there."""
    config, processor = (TEXT_MODELS | MEDIA_MODELS)[name]
    config.architectures = [name]
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def run(model, inputs, **more):
    """Call a model without a cache of keys and values, where its forward has one."""
    takes = inspect.signature(model.forward).parameters
    return model(**inputs, **more, **{"use_cache": False} if "use_cache" in takes else {})
