"""The folder that Hugging Face transformers opens, and our model classes among its own.

    FOLDER/config.json, model.safetensors                 named as in the released UniLMv2 checkpoints
    FOLDER/generation_config.json                         how targets are decoded
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
from finetune.weights import CONFIG_NAMES, FIXED_CONFIG, ORIGIN, with_head
from pretrain.export import CONFIG, WEIGHTS, StoredModel, unfinished_folder

MODEL_TYPE, GENERATION_CONFIG = "pmlm", "generation_config.json"
_CODE = Path(__file__).with_name("modeling_pmlm.py")
_AUTO_CLASSES = {
    "AutoConfig": "PMLMConfig", "AutoModel": "PMLMModel", "AutoModelForMaskedLM": "PMLMForMaskedLM",
    "AutoModelForSequenceClassification": "PMLMForSequenceClassification",
    "AutoModelForQuestionAnswering": "PMLMForQuestionAnswering", "AutoModelForSeq2SeqLM": "PMLMForConditionalGeneration",
}  # fmt: skip


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """How transformers is to decode, so that it does as finetune/search.py: what is in no target, and an exact stopping rule."""
    never = sorted({tokenizer.pad_id, tokenizer.sos_id, tokenizer.mask_id} - {tokenizer.eos_id})
    return {
        "decoder_start_token_id": tokenizer.sos_id, "pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.sos_id,
        "eos_token_id": tokenizer.eos_id, "suppress_tokens": never, "early_stopping": "never",
    }  # fmt: skip


def unilm_config(stored: StoredModel, tokenizer_file: str) -> dict[str, Any]:
    """What config.json says for UniLM and for transformers; `tokenizer_file` is the original tokenizer's name beside it."""
    numbers = vars(stored.config)
    return {
        **{theirs: numbers[ours] for ours, theirs in CONFIG_NAMES.items()},
        **FIXED_CONFIG, "attention_probs_dropout_prob": stored.config.dropout,
        ORIGIN: {**stored.origin, "tokenizer_file": tokenizer_file},
    }  # fmt: skip


def write_huggingface(output: Path, stored: StoredModel) -> None:
    """Write the folder `output`, whole. Raises ValueError where it exists or the tokenizer cannot be converted."""
    stored, tokenizer = with_head(stored), stored.tokenizer
    original = tokenizer.file_name if isinstance(tokenizer, SentencePiece) else f"pmlm_{tokenizer.file_name}"
    fast = fast_tokenizer(tokenizer)
    weights = {name: tensor.contiguous() for name, tensor in stored.weights.items()}
    with unfinished_folder(output) as folder:
        write_whole(folder / original, tokenizer.path.read_bytes())
        write_whole(folder / "tokenizer.json", fast.to_str().encode())
        write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, stored.config.max_positions))
        write_whole(folder / _CODE.name, _CODE.read_bytes())
        write_whole(folder / WEIGHTS, save(weights, metadata={"format": "pt"}))
        write_json(folder / CONFIG, {
            "model_type": MODEL_TYPE, "architectures": ["PMLMForMaskedLM"],
            "auto_map": {auto: f"{_CODE.stem}.{name}" for auto, name in _AUTO_CLASSES.items()},
            **unilm_config(stored, original),
            "pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.sos_id, "eos_token_id": tokenizer.eos_id,
            "mask_token_id": tokenizer.mask_id,
        })  # fmt: skip
        write_json(folder / GENERATION_CONFIG, generation_config(tokenizer))


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
