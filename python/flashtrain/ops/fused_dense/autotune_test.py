"""The choice of matmul algorithms: what is measured, refused, stored and taken over."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import stat
import warnings

import pytest
import torch

from flashtrain import _kernels, files
from flashtrain.ops.fused_dense import autotune, gemm
from flashtrain.ops.fused_dense.gemm import Algorithm, Operands, Product, Results
from flashtrain.testing.devices import DEVICE, cuda_only

_ALGORITHM = Algorithm(bytes(range(64)), 4096, False)


def _product(rows: int = 256, **changes) -> Product:
    return Product(gemm.FORWARD, rows, 64, 128, torch.bfloat16, DEVICE, False)._replace(**changes)


def _operands() -> Operands:
    weight = torch.randn(128, 64, device=DEVICE, dtype=torch.bfloat16)
    return Operands(torch.randn(256, 64, device=DEVICE, dtype=torch.bfloat16), weight)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune.forget()
    yield
    autotune.forget()


def _store(path: pathlib.Path) -> autotune._Store:
    return autotune._Store(path.parent, path.name)


@pytest.fixture
def _accepts_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "accepts", lambda *_: True)


# --- The file -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_accepts_all")
@pytest.mark.parametrize("choice", [None, _ALGORITHM])
def test_a_choice_is_found_again(tmp_path, choice) -> None:
    path = tmp_path / "folder" / "card.json"
    store = _store(path)
    assert store.find(_product(), _operands()) == (False, None)
    assert store.add(_product(), _operands(), choice) == choice
    assert _store(path).find(_product(), _operands()) == (True, choice)
    for other in (_product(257), _product(bias=True), _product(activation=gemm.RELU)):
        assert _store(path).find(other, _operands()) == (False, None)
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".tmp"] == []


@pytest.mark.usefixtures("_accepts_all")
def test_what_another_process_stored_is_taken_over_and_kept(tmp_path) -> None:
    path = tmp_path / "card.json"
    ours, theirs = _store(path), _store(path)
    theirs.add(_product(), _operands(), _ALGORITHM)
    theirs.add(_product(8), _operands(), None)
    assert ours.add(_product(), _operands(), None) == _ALGORITHM
    assert ours.add(_product(16), _operands(), None) is None
    choices = json.loads(path.read_text())["choices"]
    assert len(choices) == 3
    assert choices["forward 256x64x128 bfloat16 identity"] == [_ALGORITHM.data.hex(), 4096, False]


def test_an_algorithm_that_the_library_refuses_is_replaced(tmp_path, monkeypatch) -> None:
    path = tmp_path / "card.json"
    monkeypatch.setattr(gemm, "accepts", lambda *_: True)
    _store(path).add(_product(), _operands(), _ALGORITHM)
    monkeypatch.setattr(gemm, "accepts", lambda *_: False)
    store = _store(path)
    assert not store.find(_product(), _operands())[0]
    assert store.add(_product(), _operands(), None) is None
    assert _store(path).find(_product(), _operands()) == (True, None)


@pytest.mark.usefixtures("_accepts_all")
@pytest.mark.parametrize(
    "content",
    [
        "{",
        "",
        "[1]",
        '{"format": 99, "choices": {}}',
        "\x00\xff",
        '{"format": 1, "choices": [3]}',
        "[" * 200_000,
    ],
)
def test_a_file_that_is_no_store_is_replaced(tmp_path, content: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(content)
    if content[:1] in ("{", "[") and content[-1] in "]}":
        store = _store(path)
    else:
        with pytest.warns(UserWarning, match="card.json is ignored"):
            store = _store(path)
    assert not store.find(_product(), _operands())[0]


@pytest.mark.usefixtures("_accepts_all")
@pytest.mark.parametrize(
    "entry", [5, "zz", ["zz", 1, True], ["00", "x", True], ["00", float("inf"), True], [], {}]
)
def test_an_entry_that_is_no_choice_is_ignored(tmp_path, entry) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"format": 1, "choices": {_product().name(): entry}}))
    assert not _store(path).find(_product(), _operands())[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_that_cannot_be_written(tmp_path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.warns(UserWarning, match="kept for this process only; XDG_CACHE_HOME"):
        assert _store(tmp_path / "a" / "b.json").add(_product(), _operands(), None) is None


def test_a_folder_that_is_a_file(tmp_path) -> None:
    (tmp_path / "a").write_text("")
    with pytest.warns(UserWarning, match="kept for this process only; XDG_CACHE_HOME"):
        assert _store(tmp_path / "a" / "b.json").add(_product(), _operands(), None) is None


def test_a_pipe_in_place_of_the_file_is_not_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "card.json")
    with pytest.warns(UserWarning, match=r"card.json is ignored: .* is a pipe"):
        assert not _store(tmp_path / "card.json").find(_product(), _operands())[0]


@pytest.mark.usefixtures("_accepts_all")
@pytest.mark.parametrize("refusal", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_told_once(tmp_path, refusal: int, monkeypatch) -> None:
    def write(path, content):
        raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(files, "write", write)
    store = _store(tmp_path / "card.json")
    with pytest.warns(UserWarning, match="kept for this process only; XDG_CACHE_HOME"):
        assert store.add(_product(), _operands(), _ALGORITHM) == _ALGORITHM
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.add(_product(8), _operands(), None) is None


def test_without_a_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> pathlib.Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", no_home)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    with pytest.warns(UserWarning, match="no home folder is known; .* XDG_CACHE_HOME names"):
        folder = autotune._cache_dir()
    assert folder is None
    store = autotune._Store(folder, "card.json")
    assert store.add(_product(), _operands(), _ALGORITHM) == _ALGORITHM


def test_a_relative_cache_folder_is_ignored(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert autotune._cache_dir() == tmp_path / ".cache" / "flashtrain" / "matmul"


def test_wrong_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTRAIN_MATMUL_SEARCH", "yes")
    with pytest.raises(ValueError, match=r"FLASHTRAIN_MATMUL_SEARCH=yes; supported: 1 .* or 0"):
        autotune._is_enabled()


# --- What is accepted as the same result ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_results_agree_up_to_roundings(dtype: torch.dtype) -> None:
    exact = torch.randn(64, 128, device=DEVICE)
    value = exact.to(dtype)
    assert autotune._agree(Results(value), Results(value.clone()))
    nudged = (exact * (1 + 2.0**-12)).to(dtype)
    assert autotune._agree(Results(nudged), Results(value))
    for wrong in (float("nan"), float("inf"), 3.0 * exact.abs().max().item()):
        other = value.clone()
        other[13, 77] = wrong
        assert not autotune._agree(Results(other), Results(value))
        assert not autotune._agree(Results(value, other), Results(value, value))
        assert not autotune._agree(Results(value, None, other[13]), Results(value, None, value[13]))
    assert not autotune._agree(Results(value.flip(0)), Results(value))


# --- The search -----------------------------------------------------------------------------------


@cuda_only
def test_a_choice_is_measured_once_and_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    measure = autotune._search

    def spy(product: Product):
        searches.append(product)
        return measure(product)

    monkeypatch.setattr(autotune, "_search", spy)
    product, operands = _product(), _operands()
    choice = autotune.choose(product, operands)
    assert autotune.choose(product, operands) == choice
    autotune.forget()  # as a new process would
    assert autotune.choose(product, operands) == choice
    assert searches == [product]


@cuda_only
def test_the_random_numbers_of_the_user_stay() -> None:
    operands = _operands()
    torch.manual_seed(5)
    expected = torch.randn(4, device=DEVICE)
    torch.manual_seed(5)
    autotune.choose(_product(), operands)
    assert torch.equal(torch.randn(4, device=DEVICE), expected)


@cuda_only
@pytest.mark.parametrize("fault", ["wrong", "nan", "refused"])
def test_an_algorithm_with_a_fault_is_dropped(fault: str, monkeypatch) -> None:
    run = gemm.run_fused

    def faulty(product: Product, operands: Operands, algorithm: Algorithm) -> Results:
        if fault == "refused":
            raise RuntimeError("fused_dense: cublasLtMatmul failed: CUBLAS_STATUS_NOT_SUPPORTED")
        results = run(product, operands, algorithm)
        results.out[3, 5] = float("nan") if fault == "nan" else 100.0
        return results

    monkeypatch.setattr(gemm, "run_fused", faulty)
    # Were it not for the faults, the plain path would be too slow to be chosen.
    plain = gemm.run_plain

    def slow(*args):
        torch.cuda._sleep(2_000_000)
        return plain(*args)

    monkeypatch.setattr(gemm, "run_plain", slow)
    assert autotune._search(_product()) is None
    monkeypatch.setattr(gemm, "run_fused", run)
    assert autotune._search(_product()) is not None


@cuda_only
def test_an_algorithm_that_loses_nan_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    run, plain = gemm.run_fused, gemm.run_plain

    def loses(*args) -> Results:
        results = run(*args)
        results.out.nan_to_num_()
        return results

    def slow(*args) -> Results:
        torch.cuda._sleep(2_000_000)
        return plain(*args)

    monkeypatch.setattr(gemm, "run_fused", loses)
    monkeypatch.setattr(gemm, "run_plain", slow)
    assert autotune._search(_product(activation=gemm.GELU_APPROX)) is None


@cuda_only
def test_a_faster_plain_path_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = gemm.run_fused

    def slow(*args):
        torch.cuda._sleep(2_000_000)
        return run(*args)

    monkeypatch.setattr(gemm, "run_fused", slow)
    assert autotune._search(_product()) is None


@cuda_only
def test_nothing_is_measured_when_switched_off(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("FLASHTRAIN_MATMUL_SEARCH", "0")
    monkeypatch.setattr(autotune, "_search", lambda product: pytest.fail("measured"))
    first = autotune.choose(_product(), _operands())
    assert first == gemm.algorithms(_product(), _operands(), 1)[0]
    assert not list(tmp_path.rglob("*.json"))


@cuda_only
def test_changing_row_counts_end_the_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "_MAX_ROW_COUNTS", 2)
    searches = []
    monkeypatch.setattr(autotune, "_search", lambda product: searches.append(product))
    for rows in (8, 16, 24, 32):
        left = torch.zeros(rows, 64, device=DEVICE, dtype=torch.bfloat16)
        autotune.choose(_product(rows), Operands(left, _operands().right))
    assert [product.rows for product in searches] == [8, 16]


@cuda_only
def test_out_of_memory_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def fail(product: Product):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(autotune, "_search", fail)
    assert autotune.choose(_product(), _operands()) is not None
    assert not list(tmp_path.rglob("*.json"))


# --- The bindings beneath -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matmul": 3}, "matmul: got 3; supported: 0, 1, 2"),
        ({"left": torch.zeros(8, 16)[:, ::2]}, "left: got .*supported: a contiguous tensor"),
        ({"left": torch.zeros(8, 8).long()}, "left: got int64 .*supported: dtype float32"),
        ({"left": torch.zeros(())}, "left: got a scalar"),
        ({"right": torch.zeros(8, 9)}, r"right: got .*\[8, 9\].*supported: shape \[8, 8\]"),
        ({"right": torch.zeros(8, 8).half()}, "right: got float16 .*supported: dtype float32"),
        ({"out": torch.zeros(8, 9)}, r"out: got .*supported: shape \[8, 8\]"),
        ({"bias": torch.zeros(9)}, r"bias: got .*supported: shape \[8\]"),
        ({"pre_act": torch.zeros(8)}, r"pre_act: got .*supported: shape \[8, 8\]"),
        ({"matmul": 2, "dbias": torch.zeros(9)}, r"dbias: got .*supported: shape \[8\]"),
        ({}, "left: is on cpu; supported: cuda"),
    ],
)
def test_bindings_name_the_argument(changes: dict, message: str) -> None:
    arguments = {
        "matmul": 0,
        "left": torch.zeros(8, 8),
        "right": torch.zeros(8, 8),
        "out": torch.zeros(8, 8),
        "bias": None,
        "pre_act": None,
        "dbias": None,
        "activation": gemm.IDENTITY,
        "allow_tf32": False,
        "max_algorithms": 1,
    }
    with pytest.raises(ValueError, match=message):
        _kernels.dense_matmul_algorithms(**(arguments | changes))


@cuda_only
@pytest.mark.parametrize("matmul", [gemm.FORWARD, gemm.WEIGHT_GRADIENT])
def test_an_algorithm_of_another_size_is_refused(matmul: int) -> None:
    product, operands = _product(matmul=matmul), _operands()
    if matmul == gemm.WEIGHT_GRADIENT:
        operands = Operands(operands.left.new_zeros(256, 128), operands.left)
    with pytest.raises(ValueError, match="algorithm: got 3 bytes; supported: 64"):
        gemm.run_fused(product, operands, Algorithm(b"abc", 0, False))
    assert not gemm.accepts(product, operands, Algorithm(b"abc", 0, False))
