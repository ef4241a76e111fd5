"""The tensors of a GGUF file as transformers names them, each dequantised when it is asked for and not before."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ENTRIES = 1 << 19  # that are dequantised at a time: it takes several times their memory


class LazyTensor:
    """One tensor of a file; ``lazy[...]`` reads it, as transformers does with slices of safetensors.

    Args:
        tensor: gguf's.
        processor: transformers', which knows how an architecture's weights are laid out in the file.
    """

    def __init__(self, tensor: Any, processor: Any) -> None:
        self._tensor, self._processor = tensor, processor

    def __getitem__(self, _: Any) -> Tensor:
        import numpy
        from gguf import dequantize

        data, kind = self._tensor.data, self._tensor.tensor_type
        whole, columns = None, int(self._tensor.shape[0])  # gguf's shapes begin with them
        count = max(_ENTRIES // columns, 1)
        for start in range(0, len(data), count):
            some: Any = dequantize(data[start : start + count], kind)
            if whole is None:
                whole = numpy.empty((len(data), *some.shape[1:]), numpy.float32)
            whole[start : start + len(some)] = some
        weights = self._processor.process(weights=whole, name=self._tensor.name).weights
        return torch.from_numpy(numpy.ascontiguousarray(weights))


def lazy_tensors(file: Path, config: Any, auto: Any) -> tuple[Any, Mapping[str, LazyTensor]] | None:
    """The model's class, and name -> tensor; None where this transformers takes no such mapping, or weights are made of several tensors.

    Args:
        file: the GGUF file.
        config: transformers', read from it.
        auto: transformers' class for it.
    """
    import transformers
    from gguf import GGUFReader
    from transformers import modeling_gguf_pytorch_utils as reading

    reader: Any = GGUFReader(file)
    architecture = reading.read_field(reader, "general.architecture")[0]
    kind: Any = reading.TENSOR_PROCESSORS.get(architecture, reading.TensorProcessor)
    single = ("TensorProcessor", "LlamaTensorProcessor", "NemotronTensorProcessor", "Gemma2TensorProcessor")
    if int(transformers.__version__.partition(".")[0]) < 5 or kind.__name__ not in single or "moe" in architecture:
        return None
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    processor = kind(config=config.to_dict())
    names = reading.get_gguf_hf_weights_map(skeleton, processor)
    return type(skeleton), {names[t.name]: LazyTensor(t, processor) for t in reader.tensors if t.name in names}
