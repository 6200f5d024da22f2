"""Golden logits: tiny seeded models of every supported family, and the trained models, in transformers.

    python tests/oracle/logits.py                  models made here, and tests/models/tiny-1m
    python tests/oracle/logits.py --shared DIR     the larger trained models, folders in DIR

Weights are loaded in the type they are stored in and widened to float32, which is exact; attention is
transformers' "eager" path. Each family lists ablations: configuration changes that a wrong reader
would make. The script fails unless every one of them moves the logits far beyond the tests' tolerance,
so that the golden values can tell right from wrong.
"""

import argparse
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from record import GOLDEN, TESTS, provenance, write

PACKAGES = ["transformers", "torch", "safetensors", "tokenizers", "numpy"]
# Tests accept 1e-4 of the largest logit; an ablation must move the logits by a hundred times that.
VISIBLE = 1e-2

# Written for this file; CC0.
TEXT = (
    "The lighthouse keeper counted the waves until the fog came in. At half past four the bell rang "
    "twice, which meant that a boat had passed the outer rocks, and she wrote the hour in the book. "
    "Nobody had asked for the book in eleven years. She kept it anyway, because a record that stops "
    "on a quiet day is worth nothing on a loud one."
)


@dataclass
class Family:
    """One kind of checkpoint: its configuration and what a reader may get wrong about it."""

    architecture: str
    config: dict
    tokens: int = 32
    old_keys: bool = False
    ablations: dict = field(default_factory=dict)


def sizes(hidden, ffn, layers, heads, kv_heads, vocab, **more):
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | more


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

FAMILIES = {
    "llama2": Family(
        "LlamaForCausalLM",
        sizes(48, 88, 2, 4, 4, 96, rms_norm_eps=0.02, rope_parameters=DEFAULT_ROPE),
        ablations={
            "rope_theta": {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 500.0}},
            "rms_norm_eps": {"rms_norm_eps": 1e-5},
        },
    ),
    "llama3": Family(
        "LlamaForCausalLM",
        sizes(64, 88, 2, 4, 2, 112, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
        tokens=40,
        ablations={"no_rope_scaling": {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 500.0}}},
    ),
    # The keys of Llama 3.1 as published: rope_theta and rope_scaling apart, torch_dtype.
    "llama3-old-keys": Family(
        "LlamaForCausalLM",
        sizes(40, 72, 3, 5, 1, 100, head_dim=8, rope_parameters=LLAMA3_ROPE),
        tokens=40,
        old_keys=True,
        ablations={"no_rope_scaling": {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 500.0}}},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        sizes(48, 80, 2, 4, 2, 96, head_dim=16, sliding_window=None, rope_parameters=DEFAULT_ROPE),
        ablations={"default_window": {"sliding_window": 16}},
    ),
    "mistral-window": Family(
        "MistralForCausalLM",
        sizes(48, 80, 2, 4, 2, 96, head_dim=12, sliding_window=8, rope_parameters=DEFAULT_ROPE),
        ablations={
            "no_window": {"sliding_window": None},
            "one_short": {"sliding_window": 7},
            "one_long": {"sliding_window": 9},
        },
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        sizes(56, 88, 2, 4, 2, 96, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        ablations={"rope_theta": {"rope_parameters": DEFAULT_ROPE}},
    ),
    # As Qwen2.5 is published: tied, the old keys, and a sliding_window that use_sliding_window turns off.
    "qwen2-tied-old-keys": Family(
        "Qwen2ForCausalLM",
        sizes(48, 88, 3, 6, 2, 128, tie_word_embeddings=True, sliding_window=8, max_window_layers=1,
              use_sliding_window=False, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        old_keys=True,
        ablations={"window_on": {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        sizes(40, 88, 2, 4, 2, 96, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
        ablations={"rope_theta": {"rope_parameters": DEFAULT_ROPE}},
    ),
    "qwen3-tied": Family(
        "Qwen3ForCausalLM",
        sizes(40, 104, 3, 5, 1, 112, head_dim=12, tie_word_embeddings=True, rope_parameters=DEFAULT_ROPE),
        ablations={"rope_theta": {"rope_parameters": DEFAULT_ROPE | {"rope_theta": 1000000.0}}},
    ),
}


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight that makes every part of the model matter: no norm of ones, no bias of zeros."""
    if "norm" in name:
        return torch.rand(shape, generator=generator) + 0.5
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return noise * 0.5
    if "embed_tokens" in name:
        return noise * 0.4
    gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "lm_head")) else 1.2
    return noise * gain / shape[1] ** 0.5


def stored_dtype(name: str) -> torch.dtype:
    """Three types in one file: a float16 projection in block 0, norms and one projection a block in float32."""
    if "layers.0.mlp.down_proj" in name:
        return torch.float16
    if "norm" in name or "k_proj" in name:
        return torch.float32
    return torch.bfloat16


def make_weights(model: torch.nn.Module, tied: bool, seed: int) -> dict[str, torch.Tensor]:
    """Seeded weights in their stored types, in the order of their names."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_weight(name, value.shape, generator).to(stored_dtype(name)).contiguous()
        for name, value in sorted(model.state_dict().items())
        if not (tied and name == "lm_head.weight")
    }


def to_old_keys(path: Path) -> None:
    """Rewrites config.json with the keys that transformers wrote before version 5."""
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    # Not there in the old files: the version that wrote them, and the layer types made of the window keys.
    config.pop("transformers_version")
    config.pop("layer_types", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def make_folder(name: str, family: Family, seed: int) -> Path:
    """Writes the Hugging Face folder of one family and returns its path."""
    folder = GOLDEN / "models" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model_class = getattr(transformers, family.architecture)
    config = model_class.config_class(**json.loads(json.dumps(family.config)))
    config.architectures = [family.architecture]
    config.dtype = "bfloat16"
    weights = make_weights(model_class(config), config.tie_word_embeddings, seed)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config.save_pretrained(folder)
    path = folder / "config.json"
    if family.old_keys:
        if "sliding_window" in family.config:
            written = json.loads(path.read_text()) | {"sliding_window": family.config["sliding_window"]}
            path.write_text(json.dumps(written))
        to_old_keys(path)
    return folder


def load(folder: Path, overrides: dict | None = None) -> torch.nn.Module:
    """The folder's model in float32 with eager attention, its weights checked against the file's."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if overrides:
        # Built anew from plain keys, so that derived fields such as layer_types follow the change.
        keys = {key: value for key, value in config.to_dict().items() if value is not None}
        config = type(config)(**(keys | overrides))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = model.state_dict()
    for name, value in load_file(folder / "model.safetensors").items():
        assert torch.equal(state[name], value.float()), f"{name} was not widened exactly"
    return model


def logits_of(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """Logits `[positions, vocab]` in float32 of one forward pass without a cache."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    assert logits.dtype == torch.float32 and bool(torch.isfinite(logits).all())
    return logits.numpy()


def run_ablations(folder: Path, family: Family, tokens: list[int], logits: np.ndarray) -> dict:
    """How far each wrong reading moves the logits, relative to the largest."""
    moved = {}
    for name, overrides in family.ablations.items():
        other = logits_of(load(folder, overrides), tokens)
        moved[name] = float(np.abs(other - logits).max() / np.abs(logits).max())
        assert moved[name] > VISIBLE, f"{folder.name}: {name} moves the logits by only {moved[name]:.1e}"
    return {name: float(f"{value:.3g}") for name, value in moved.items()}


def family_logits(name: str, family: Family, seed: int) -> None:
    """Makes one family's folder and its golden logits of all positions."""
    folder = make_folder(name, family, seed)
    size = (folder / "model.safetensors").stat().st_size
    assert size < 150_000, f"{name}: {size} bytes"
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab = family.config["vocab_size"]
    tokens = torch.randint(3, vocab, (family.tokens,), generator=generator).tolist()
    logits = logits_of(load(folder), tokens)
    assert logits.std() > 1.0, f"{name}: logits spread only {logits.std():.2f}"
    write(
        GOLDEN / "logits" / f"{name}.json",
        provenance("python tests/oracle/logits.py", PACKAGES)
        | {
            "model": f"tests/golden/models/{name}",
            "seed": seed,
            "ablations": run_ablations(folder, family, tokens, logits),
            "tokens": tokens,
            "positions": list(range(len(tokens))),
            "logits": logits,
        },
    )


def text_logits(folder: Path, model_name: str, out: Path, last: int, command: str) -> None:
    """Golden logits of the last positions of one 64-token window of English text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids[:64]
    assert len(tokens) == 64
    logits = logits_of(load(folder), tokens)
    write(
        out,
        provenance(command, PACKAGES)
        | {
            "model": model_name,
            "text": TEXT,
            "tokens": tokens,
            "positions": list(range(64 - last, 64)),
            "logits": logits[-last:],
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, help="folder of ref-15m and ref-15m-outlier")
    shared = parser.parse_args().shared
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if shared:
        for name in ("ref-15m", "ref-15m-outlier"):
            out = GOLDEN / "logits" / "shared" / f"{name}.json"
            text_logits(shared / name, name, out, 2, "python tests/oracle/logits.py --shared DIR")
        return
    for seed, (name, family) in enumerate(FAMILIES.items(), start=1):
        family_logits(name, family, seed)
    tiny = TESTS / "models" / "tiny-1m"
    text_logits(tiny, "tests/models/tiny-1m", GOLDEN / "logits" / "tiny-1m.json", 4, "python tests/oracle/logits.py")


if __name__ == "__main__":
    main()
