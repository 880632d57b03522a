"""OME-Zarr behind a server: whole, slow, failing for a while, and failing for good."""

import pickle
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import Namespace

from muvit.cli import main
from muvit.cli.slides import open_selected
from muvit.data.crops.crops import GridCrops
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.pyramids import remote
from muvit.data.pyramids.convert import convert_image
from muvit.data.slides.open import open_slide
from muvit.errors import ReadError


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of a folder; its attribute ``faults`` holds what it answers next in place of files."""
    monkeypatch.setattr(remote, "_RETRIES", {"max_retries": 2, "initial_delay": "10ms", "max_delay": "20ms"})
    remote.remote_context.cache_clear()
    answers = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            fault = answers.pop(0) if answers else None
            if isinstance(fault, float):
                time.sleep(fault)
            if isinstance(fault, threading.Barrier):
                fault.wait()
            file = tmp_path / "served" / self.path.lstrip("/")
            if isinstance(fault, int) or not file.is_file():
                return self.send_error(fault if isinstance(fault, int) else 404)
            content, found = file.read_bytes(), re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
            low, high = found.groups() if found else ("", "")
            start = int(low) if low else len(content) - int(high or len(content))
            part = content[start : int(high) + 1 if low and high else None]
            self.send_response(206 if found else 200)
            self.send_header("Content-Length", str(len(part)))
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(content)}")
            self.send_header("ETag", '"1"')  # which S3 sends
            self.end_headers()
            return self.wfile.write(part)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.faults = answers
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
    remote.remote_context.cache_clear()


@pytest.fixture
def pixels(tmp_path):
    from memory_slide import MemorySlide

    pixels = np.random.default_rng(0).integers(0, 256, (1, 300, 420), np.uint8)
    for form, name in (("ome-zarr-0.5", "a"), ("ome-zarr-0.4", "b")):
        convert_image(
            MemorySlide({1: pixels}),
            tmp_path / "served" / "bucket" / f"{name}.ome.zarr",
            format=form,
            pixel_size_um=0.5,
        )
    return pixels


def test_workers_of_dask_get_the_address_and_files_their_whole_path(server, pixels, tmp_path, monkeypatch):
    url = f"http://127.0.0.1:{server.server_port}/bucket/a.ome.zarr"
    given = Namespace(series=None, z=None, t=None, channels=None, pixel_size_um=None)
    assert str(open_selected(given, Path(url), backend="dask").path) == url
    monkeypatch.chdir(tmp_path / "served")
    assert open_selected(given, Path("bucket/a.ome.zarr"), backend="dask").path.is_absolute()


@pytest.mark.parametrize("name", ["a.ome.zarr", "b.ome.zarr"])
def test_stores_are_read_over_http(server, pixels, name):
    url = f"http://127.0.0.1:{server.server_port}/bucket/{name}"
    for address in (url, Path(url)):  # as the command line gives it
        slide = open_slide(address)
        assert (slide.shape, slide.pixel_size_um, slide.name) == ((300, 420), (0.5, 0.5), name[0])
        assert str(slide.path) == url
        np.testing.assert_array_equal(slide.read(1, (20, 30), (200, 300)), pixels[:, 20:220, 30:330])
    copy = pickle.loads(pickle.dumps(slide))
    assert str(copy.path) == url and copy.identify() == slide.identify()


def test_stores_are_read_from_s3(server, pixels, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    slide = open_slide("s3://bucket/a.ome.zarr")
    np.testing.assert_array_equal(slide.read(1, (0, 0), slide.shape), pixels)


def test_windows_of_a_batch_are_asked_for_together(server, pixels):
    """Neither of two chunks is sent before both have been asked for."""
    slide = open_slide(f"http://127.0.0.1:{server.server_port}/bucket/b.ome.zarr")
    crops = GridCrops([(slide, None)], CropConfig(levels=(1,), size=(64, 64), normalization=Range(), cache_mib=0))
    both = threading.Barrier(2, timeout=5)
    server.faults += [both, both]
    first, second = crops.__getitems__([0, 5])
    assert not both.broken and not server.faults
    np.testing.assert_array_equal(first["img"][0], pixels[:, :64, :64])
    np.testing.assert_array_equal(second["img"][0], pixels[:, :64, 320:384])


def test_requests_that_fail_are_repeated_and_then_given_up(server, pixels, capfd):
    url = f"http://127.0.0.1:{server.server_port}/bucket/a.ome.zarr"
    server.faults += [503, 503]
    slide = open_slide(url)
    server.faults += [503] * 50
    with pytest.raises(ReadError, match=r"a\.ome\.zarr/0: expected an answer of the server, got .*503"):
        slide.read(1, (0, 0), (9, 9))
    assert main(["info", url]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"muvit: {url}/zarr.json: expected an answer of the server, got ")
    assert line.endswith("Check the address and the connection and repeat the command, or download the store.")
    server.faults.clear()
    assert slide.read(1, (0, 0), (9, 9)).tolist() == pixels[:, :9, :9].tolist()


def test_a_server_that_stops_answering_is_given_up(server, pixels, monkeypatch):
    slide = open_slide(f"http://127.0.0.1:{server.server_port}/bucket/a.ome.zarr")
    monkeypatch.setattr(remote, "_TIMEOUT_S", 0.2)
    server.faults += [1.0] * 3
    with pytest.raises(ReadError, match=r"expected an answer of the server, got none within 0\.2 s"):
        slide.read(1, (0, 0), (9, 9))
    time.sleep(0.9)


def test_addresses_without_a_store_are_refused(server, pixels):
    with pytest.raises(ReadError, match="expected an OME-Zarr image"):
        open_slide(f"http://127.0.0.1:{server.server_port}/bucket/c.ome.zarr")
    with pytest.raises(ReadError, match="expected an answer of the server"):
        open_slide("http://127.0.0.1:9/a.ome.zarr")  # where nobody listens
