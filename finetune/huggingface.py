"""The folder that Hugging Face transformers opens, and our model classes among its own.

    FOLDER/config.json, model.safetensors                 named as in the released UniLMv2 checkpoints
    FOLDER/generation_config.json                         how targets are decoded
    FOLDER/README.md                                      the model card
    FOLDER/modeling_pmlm.py                               the code, so that the folder loads without this repository
    FOLDER/tokenizer.json, tokenizer_config.json          transformers' fast tokenizer
    FOLDER/tokenizer.model or pmlm_tokenizer.json         the tokenizer it was made of, for the way back

Writing it needs no transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save

from data_prep.files import write_json, write_whole
from data_prep.tokenizer import SentencePiece, Tokenizer
from finetune.fast_tokenizer import fast_tokenizer, tokenizer_config
from finetune.model_card import Purpose, masked_lm, model_card
from finetune.search_settings import SearchSettings
from finetune.weights import CONFIG_NAMES, FIXED_CONFIG, ORIGIN, with_head
from pretrain.export import CONFIG, WEIGHTS, StoredModel, unfinished_folder

MODEL_TYPE, GENERATION_CONFIG, MODEL_CARD = "pmlm", "generation_config.json", "README.md"
_CODE = Path(__file__).with_name("modeling_pmlm.py")
_AUTO_CLASSES = {
    "AutoConfig": "PMLMConfig", "AutoModel": "PMLMModel", "AutoModelForMaskedLM": "PMLMForMaskedLM",
    "AutoModelForSequenceClassification": "PMLMForSequenceClassification",
    "AutoModelForQuestionAnswering": "PMLMForQuestionAnswering", "AutoModelForSeq2SeqLM": "PMLMForConditionalGeneration",
}  # fmt: skip


def generation_config(tokenizer: Tokenizer, search: SearchSettings, max_positions: int) -> dict[str, Any]:
    """Return how transformers is to decode, so that it does as finetune/search.py; modeling_pmlm.py adds an exact stopping rule.

    The released code's length penalty, words that may repeat and forbidden words have no counterpart there, and are not written.
    """
    never = sorted({tokenizer.pad_id, tokenizer.sos_id, tokenizer.mask_id} - {tokenizer.eos_id})
    given = {
        "num_beams": search.num_beams, "no_repeat_ngram_size": search.no_repeat_ngram,
        "min_new_tokens": search.min_length_tokens,
        "length_penalty": 1.0 if search.released_length_penalty else search.length_penalty,
    }  # fmt: skip
    theirs = {"num_beams": 1, "no_repeat_ngram_size": 0, "min_new_tokens": 0, "length_penalty": 1.0}
    return {
        "decoder_start_token_id": tokenizer.sos_id, "pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.sos_id,
        "eos_token_id": tokenizer.eos_id, "suppress_tokens": never, "max_new_tokens": min(search.max_length_tokens, max_positions // 2),
        **{name: value for name, value in given.items() if value != theirs[name]},
    }  # fmt: skip


def unilm_config(stored: StoredModel, tokenizer_file: str) -> dict[str, Any]:
    """What config.json says for UniLM and for transformers; `tokenizer_file` is the original tokenizer's name beside it."""
    numbers = vars(stored.config)
    return {
        **{theirs: numbers[ours] for ours, theirs in CONFIG_NAMES.items()},
        **FIXED_CONFIG, "attention_probs_dropout_prob": stored.config.dropout,
        ORIGIN: {**stored.origin, "tokenizer_file": tokenizer_file},
    }  # fmt: skip


def write_huggingface(output: Path, stored: StoredModel, purpose: Purpose | None = None) -> None:
    """Write the folder `output`, whole; `purpose` is a fine-tuned model's, whose output layers are among the weights.

    Raises ValueError where it exists or the tokenizer cannot be converted.
    """
    if purpose is None:
        stored, purpose = with_head(stored), masked_lm()
    tokenizer = stored.tokenizer
    longest = min(purpose.max_length_tokens or stored.config.max_positions, stored.config.max_positions)
    original = tokenizer.file_name if isinstance(tokenizer, SentencePiece) else f"pmlm_{tokenizer.file_name}"
    fast = fast_tokenizer(tokenizer)
    weights = {name: tensor.contiguous() for name, tensor in stored.weights.items()}
    with unfinished_folder(output) as folder:
        write_whole(folder / original, tokenizer.path.read_bytes())
        write_whole(folder / "tokenizer.json", fast.to_str().encode())
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, longest))
        write_whole(folder / _CODE.name, _CODE.read_bytes())
        write_whole(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
        write_json(folder / CONFIG, {
            "model_type": MODEL_TYPE, "architectures": [purpose.architecture],
            "auto_map": {auto: f"{_CODE.stem}.{name}" for auto, name in _AUTO_CLASSES.items()},
            **unilm_config(stored, original),
            "pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.sos_id, "eos_token_id": tokenizer.eos_id,
            "mask_token_id": tokenizer.mask_id, **purpose.config,
        })  # fmt: skip
        write_json(
            folder / GENERATION_CONFIG, generation_config(tokenizer, purpose.search, stored.config.max_positions)
        )
        write_whole(folder / MODEL_CARD, model_card(purpose, stored.origin).encode())


def register() -> None:
    """Make transformers' Auto classes know these models in this process, without `trust_remote_code`.

    What `save_pretrained` then writes has the code in it, too. Raises ImportError without transformers.
    """
    import transformers

    from finetune import modeling_pmlm

    transformers.AutoConfig.register(MODEL_TYPE, modeling_pmlm.PMLMConfig, exist_ok=True)
    for auto, name in _AUTO_CLASSES.items():
        cls = getattr(modeling_pmlm, name)
        cls.register_for_auto_class(auto)
        if auto != "AutoConfig":
            getattr(transformers, auto).register(modeling_pmlm.PMLMConfig, cls, exist_ok=True)
