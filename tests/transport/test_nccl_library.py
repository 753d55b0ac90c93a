"""The typed layer over NCCL: with the stand-in always, and with the real library where there is one, as far as that goes without a GPU."""

from __future__ import annotations

import ctypes
import pickle
from pathlib import Path
from typing import Any

import pytest

from polymux.transport.errors import NcclError
from polymux.transport.nccl import api
from polymux.transport.nccl.api import IN_PROGRESS, REMOTE_ERROR, SUCCESS, UNIQUE_ID_BYTES, Nccl, find_library, version_text


@pytest.fixture
def stand_in_nccl(at_rest: Any) -> Nccl:
    return Nccl.load(at_rest.library())


@pytest.fixture(scope="module")
def real() -> Nccl:
    try:
        return Nccl.load(find_library())
    except OSError:
        pytest.skip("no libnccl here; the extra `nccl` brings one")


def test_the_real_library_says_which_release_it_is(real: Nccl) -> None:
    assert real.version >= api.MIN_VERSION
    assert version_text(real.version).startswith("2.")


def test_unique_ids_of_the_real_library_are_whole_and_never_the_same(real: Nccl) -> None:
    made = {real.unique_id() for _ in range(3)}
    assert len(made) == 3 and {len(one) for one in made} == {UNIQUE_ID_BYTES}


def test_the_real_library_has_words_for_every_code(real: Nccl) -> None:
    texts = [real.text(code) for code in range(IN_PROGRESS + 1)]
    assert "no error" in texts[SUCCESS] and "remote" in texts[REMOTE_ERROR] and len(set(texts)) == len(texts)


def test_the_real_library_refuses_what_is_no_communicator(real: Nccl) -> None:
    with pytest.raises(NcclError, match="ncclCommGetAsyncError: invalid argument"):
        real.async_error(0)
    with pytest.raises(NcclError, match="ncclSend"):
        real.send(0, 0, 16, 1, 0)
    real.abort(0)  # of nothing is nothing


def test_without_a_device_the_real_library_says_so_and_does_not_hang(real: Nccl) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(NcclError, match=r"cuda|CUDA|driver"):
        comm = real.init(real.unique_id(), 0)
        code = IN_PROGRESS
        while code == IN_PROGRESS:
            code = real.async_error(comm)
        raise NcclError(real.text(code, comm))


def test_the_configuration_is_laid_out_as_the_header_of_that_release_has_it() -> None:
    offsets = {name: getattr(api._Config, name).offset for name, *_ in api._Config._fields_}
    assert offsets == {
        "size": 0,
        "magic": 8,
        "version": 12,
        "blocking": 16,
        "cga_cluster_size": 20,
        "min_ctas": 24,
        "max_ctas": 28,
        "net_name": 32,
        "split_share": 40,
    }
    assert ctypes.sizeof(api._Config) == 48


def test_a_library_that_is_too_old_is_refused_by_name(at_rest: Any) -> None:
    at_rest.turn(version=21705)
    with pytest.raises(NcclError, match=r"2\.17\.5 is older than 2\.18\.0"):
        Nccl.load(at_rest.library())


def test_a_file_that_is_not_the_library_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "libnccl.so.2").write_bytes(b"not a library")
    with pytest.raises(OSError):
        Nccl.load(str(tmp_path / "libnccl.so.2"))
    with pytest.raises(AttributeError):
        Nccl.load("libc.so.6")


def test_a_library_is_chosen_by_the_environment_before_torchs(at_rest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(api.LIBRARY_VARIABLE, at_rest.library())
    assert Nccl.load().path == at_rest.library()


def test_calls_that_go_on_are_no_errors(stand_in_nccl: Nccl) -> None:
    comm = stand_in_nccl.init(stand_in_nccl.unique_id(), 0)
    assert stand_in_nccl.async_error(comm) == IN_PROGRESS
    stand_in_nccl.abort(comm)


def test_an_error_of_nccl_survives_the_way_to_another_process() -> None:
    error = pickle.loads(pickle.dumps(NcclError("stuck")))
    assert isinstance(error, NcclError) and error.message == "stuck"
