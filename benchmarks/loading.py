"""Memory while a base is loaded: the process's peak (VmHWM) beyond its imports, against what the loaded base takes.

    python benchmarks/loading.py [--hidden 1024] [--layers 16] [--vocabulary 32000] [--out benchmarks/results/loading.json]

Each form is loaded in a process of its own, from a random Llama written as sharded safetensors in bf16 and as a GGUF file in Q8_0; and the
built-in model, whose checkpoint is in fp32 and whose tokenizer is part of the peak. Kinds of quantisation whose package is missing fail.
A small model of the same kind is loaded first, so that what is imported on the way is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BUILT_IN = "smollm2-135m-instruct"
QUANTISED = ("fp32, int8", "mixed, int8", "mixed, int4", "mixed, bnb-int8", "mixed, bnb-nf4")
FORMS = [("safetensors", form) for form in ("fp32", "mixed", *QUANTISED)]
FORMS += [("gguf", form) for form in ("fp32", "mixed", "mixed, int8", "mixed, int4")]
FORMS += [(BUILT_IN, form) for form in QUANTISED]


def build(directory: Path, hidden: int, layers: int, vocabulary: int) -> None:
    """A random Llama as sharded safetensors (``directory``/safetensors) and as GGUF (``directory``/gguf/model.gguf)."""
    import gguf
    import torch
    import transformers

    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config = transformers.LlamaConfig(
        **sizes, **heads, vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=512
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(directory / "safetensors", max_shard_size="100MB")
    tokenizer(directory / "safetensors", vocabulary)
    (directory / "gguf").mkdir()
    writer = gguf.GGUFWriter(directory / "gguf" / "model.gguf", "llama")
    writer.add_name("random")
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(hidden // 64)
    writer.add_head_count_kv(hidden // 64)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["</s>", "t", "1", *(f"t{i}" for i in range(1, vocabulary - 2))])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tokenizer(directory: Path, vocabulary: int) -> None:
    """A tokenizer of words."""
    import transformers
    from tokenizers import Tokenizer, models

    words = models.WordLevel({"</s>": 0} | {f"t{i}": i for i in range(1, vocabulary)}, unk_token="</s>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="</s>").save_pretrained(directory)


def load(path: str, form: str) -> Any:
    """The base as ``zo-opt train`` loads it."""
    import torch

    from zo_opt.models.models import load_model
    from zo_opt.models.precision import set_precision

    model, _ = load_model(path, form=form)
    set_precision(model, form, torch.device("cpu"))
    return model


def weigh(path: str, small: str, form: str) -> dict[str, int]:
    """Bytes of the loaded base, and of the process's peak beyond what was there before."""
    import torch

    from zo_opt.journal.provenance import frozen_state
    from zo_opt.system.checksum import plain_parts
    from zo_opt.system.memory import current_memory, peak_memory, reset_peak_memory

    load(small, form)
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    before = current_memory(cpu)
    model = load(path, form)
    parts = [part for name, t in frozen_state(model, ()).items() for _, part in plain_parts(name, t)]
    kept = {part.untyped_storage().data_ptr(): part.numel() * part.element_size() for part in parts}
    return {"loaded": sum(kept.values()), "peak": peak_memory(cpu) - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--only", default="", help="kinds and forms that contain this")
    parser.add_argument("--out", type=Path, help="a file for the figures; those of others in it are kept")
    parser.add_argument("--weigh", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.weigh:
        print(json.dumps(weigh(*options.weigh)))
        return
    with tempfile.TemporaryDirectory() as directory:
        big, small = Path(directory) / "big", Path(directory) / "small"
        build(big, options.hidden, options.layers, options.vocabulary)
        build(small, 128, 2, 100)
        results = json.loads(options.out.read_text()) if options.out is not None and options.out.exists() else {}
        for kind, form in FORMS:
            if options.only not in f"{kind}, {form}":
                continue
            file = "gguf/model.gguf" if kind == "gguf" else "safetensors"
            path = BUILT_IN if kind == BUILT_IN else str(big / file)
            line = [sys.executable, __file__, "--weigh", path, str(small / file), form]
            done = subprocess.run(line, check=False, capture_output=True, text=True)
            if done.returncode:
                print(f"{kind:12} {form:12} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            ratio = found["peak"] / found["loaded"]
            sizes = {} if kind == BUILT_IN else {n: getattr(options, n) for n in ("hidden", "layers", "vocabulary")}
            results[f"{kind}, {form}"] = found | {"ratio": round(ratio, 3)} | sizes
            print(
                f"{kind:12} {form:12} loaded {found['loaded'] >> 20:5} MiB  peak {found['peak'] >> 20:5} MiB  ratio {ratio:.2f}",
                flush=True,
            )
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
