"""Loading tensor by tensor: the same numbers, no second copy of a model, and a cut file ends in a sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from conftest import needs

from zo_opt import ZOError
from zo_opt.journal.provenance import frozen_state
from zo_opt.models.models import load_model
from zo_opt.models.precision import set_precision
from zo_opt.models.quantisation import KINDS
from zo_opt.system.checksum import fingerprint
from zo_opt.system.memory import MappedFiles, pieces

WORDS = ["</s>", "t", "1", *(f"t{i}" for i in range(1, 62))]


def write_gguf(path: Path, architecture: str = "llama") -> Path:
    """A random causal model whose matrices are in Q8_0."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(WORDS)
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, architecture)
    for add, value in (
        (writer.add_name, "tiny"), (writer.add_context_length, 32), (writer.add_embedding_length, 64), (writer.add_block_count, 2),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_head_count_kv, 2), (writer.add_vocab_size, len(WORDS)),
        (writer.add_layer_norm_rms_eps, 1e-6), (writer.add_tokenizer_model, "gpt2"), (writer.add_token_list, WORDS),
        (writer.add_token_merges, ["t 1"]), (writer.add_eos_token_id, 0),
    ):  # fmt: skip
        add(value)  # type: ignore[operator]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(tensor.numpy(), kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_a_gguf_file_is_read_to_the_same_bits(file: Path, precision: str) -> None:
    ours, _ = load_model(str(file), form=precision)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    for model in (ours, theirs):
        set_precision(model, precision, torch.device("cpu"))
    expected = theirs.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("kind", [needs(kind) for kind in KINDS])
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_a_gguf_file_is_quantised_as_it_is_read(file: Path, precision: str, kind: str) -> None:
    """To the bits of one that was read in full; another form is refused."""
    cpu, form = torch.device("cpu"), f"{precision}, {kind}"
    as_read, _ = load_model(str(file), form=form)
    layer = as_read.model.layers[0].self_attn.q_proj
    assert layer.weight.dtype != torch.float32 or type(layer.weight) is not torch.nn.Parameter
    after, _ = load_model(str(file))
    for model in (as_read, after):
        assert set_precision(model, form, cpu) == form
    assert fingerprint(frozen_state(as_read, ())) == fingerprint(frozen_state(after, ()))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(as_read(ids).logits, after(ids).logits)
    with pytest.raises(ZOError, match="quantised already"):
        set_precision(as_read, f"{precision}, {'int8' if kind != 'int8' else 'int4'}", cpu)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.5, 0.9, 0.999])
def test_a_cut_gguf_file_ends_in_a_sentence(file: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(ZOError, match=r"cut\.gguf' could not be loaded"):
        load_model(str(cut))


@pytest.mark.parametrize("where", [0, 5, 8, 30])
def test_a_gguf_file_with_a_changed_header_ends_in_a_sentence(file: Path, tmp_path: Path, where: int) -> None:
    content = bytearray(file.read_bytes())
    content[where : where + 4] = b"\xff\xff\xff\x7f"
    (tmp_path / "changed.gguf").write_bytes(content)
    with pytest.raises(ZOError, match=r"changed\.gguf' could not be loaded"):
        load_model(str(tmp_path / "changed.gguf"))


def test_pages_are_read_anew_after_they_were_let_go(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"w": torch.arange(1 << 16, dtype=torch.float32).view(256, 256)}, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "pt") as opened:
        mapped = opened.get_tensor("w")
    own = torch.arange(1 << 16, dtype=torch.float32).view(256, 256)
    for tensor in (mapped, own):
        files = MappedFiles()
        for piece in pieces(tensor):
            files.let_go(piece)
        assert torch.equal(tensor.flatten(), torch.arange(1 << 16, dtype=torch.float32))


MEASURE = """
import json, sys
sys.path.insert(0, {benchmarks!r})
from loading import weigh
print(json.dumps(weigh(*sys.argv[1:])))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("form", ["fp32", "mixed"])
def test_the_peak_of_loading_is_what_the_base_takes(tmp_path: Path, form: str) -> None:
    """A bf16 checkpoint in shards; of a base as small as this one the process's own needs are a larger share than 1.2 allows."""
    for name, hidden, layers in (("big", 512, 12), ("small", 64, 2)):
        config = transformers.LlamaConfig(
            hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, num_attention_heads=4, vocab_size=64
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / name, max_shard_size="20MB")
        words = {word: i for i, word in enumerate(WORDS)}
        from tokenizers import Tokenizer, models

        core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
        transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(tmp_path / name)
    code = MEASURE.format(benchmarks=str(Path(__file__).parents[1] / "benchmarks"))
    line = [sys.executable, "-c", code, str(tmp_path / "big"), str(tmp_path / "small"), form]
    done = subprocess.run(line, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["peak"] < 1.35 * found["loaded"]
