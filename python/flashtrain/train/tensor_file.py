"""safetensors files: written in one pass with their checksum, read by rows.

The format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header of
dtype, shape and place of each tensor, then their bytes. It holds nothing to execute.
Its own library reads; it cannot write to an open file or hash on the way, so this module does.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHUNK_BYTES = 16 << 20


def write(file: IO[bytes], tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Writes contiguous CPU tensors; returns the file's size and SHA-256 under "bytes", "sha256".

    Raises OSError where they cannot be written.
    """
    header: dict[str, object] = {}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors are aligned
    digest = hashlib.sha256()

    def put(data: bytes | memoryview) -> None:
        digest.update(data)
        file.write(data)

    put(struct.pack("<Q", len(encoded)))
    put(encoded)
    for tensor in tensors.values():
        data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(data), _CHUNK_BYTES):
            put(data[start : start + _CHUNK_BYTES])
    return {"bytes": 8 + len(encoded) + position, "sha256": digest.hexdigest()}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
