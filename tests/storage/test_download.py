"""Downloads from a server on this machine: cut, wrong, changed, mirrored, offline, and by many at once."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from helpers.local_server import Answer, Handler, LocalServer, body, local_server, status, until
from semseg.config.groups import CONFIG_DIR
from semseg.config.schema import DownloadConfig
from semseg.data.header_cache import cache_file
from semseg.errors import ConfigError, DownloadError
from semseg.storage.download import cache_folder, fetch_file
from semseg.storage.transfer import RefusedError, SafeSession, TransientError, classify_error

CONTENT = random.Random(304).randbytes(1_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PATH = "/weights/net.pth"
FETCH = """
import sys
from semseg.config.schema import DownloadConfig
from semseg.storage.download import fetch_file
url, cache = sys.argv[1:]
print(fetch_file(url, DownloadConfig(cache=cache, delay_s=0)))
"""


@pytest.fixture
def server() -> Iterator[LocalServer]:
    with local_server() as server:
        server.files[PATH] = CONTENT
        yield server


@pytest.fixture
def config(tmp_path: Path) -> DownloadConfig:
    return DownloadConfig(cache=str(tmp_path), timeout_s=60, delay_s=0)


def in_another_process(url: str, cache: str | None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, url, str(cache)]
    return subprocess.Popen(command, cwd=CONFIG_DIR.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def failure(server: LocalServer, config: DownloadConfig, *answers: Answer, digest: str = "") -> str:
    """The message when the server answers like this; there must be nothing under the file's name then."""
    server.answers[PATH] = list(answers)
    with pytest.raises(DownloadError) as error:
        fetch_file(server.url(PATH), config, digest=digest)
    assert not (cache_folder(config) / "net.pth").exists()
    return str(error.value)


# ---- the plain case


def test_a_file_is_downloaded_once_into_its_folder_of_the_cache(server: LocalServer, config: DownloadConfig) -> None:
    path = fetch_file(server.url(PATH), config, folder="zoo", digest=f"sha256:{SHA256}")
    assert path == cache_folder(config) / "zoo" / "net.pth"
    assert path.read_bytes() == CONTENT
    assert fetch_file(server.url(PATH), config, folder="zoo", digest=f"sha256:{SHA256}") == path
    assert len(server.asked) == 1
    assert {file.name for file in path.parent.iterdir()} <= {"net.pth", "net.pth.sha256", "net.pth.lock"}


def test_the_cache_is_where_the_first_of_four_places_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMSEG_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folder(DownloadConfig(cache="/c")) == Path("/c")
    assert cache_folder(DownloadConfig()) == Path("/a")
    assert cache_file("sizes", Path("/data"), None).parent == Path("/a")
    monkeypatch.setenv("SEMSEG_CACHE", "/")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cache_file("sizes", Path("/data"), None).parent == Path("/b/semseg")  # what is kept must be written
    monkeypatch.delenv("SEMSEG_CACHE")
    assert cache_folder(DownloadConfig()) == Path("/b/semseg")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DownloadConfig()) == Path.home() / ".cache" / "semseg"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_rank_prints(
    server: LocalServer,
    config: DownloadConfig,
    rank: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    fetch_file(server.url(PATH), config)
    output = "".join(capsys.readouterr())
    assert (SHA256 in output) == (rank == "0")
    assert bool(output) == (rank == "0")


def test_a_chunked_body_needs_no_length(server: LocalServer, config: DownloadConfig) -> None:
    def chunked(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send(200, {"Transfer-Encoding": "chunked"}, b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")

    server.answers[PATH] = [chunked]
    assert fetch_file(server.url(PATH), config).read_bytes() == b"abcde"


# ---- cuts


@pytest.mark.reliability
def test_g6_five_cuts_cost_five_requests_and_one_byte_each(server: LocalServer, config: DownloadConfig) -> None:
    cuts = [1000, 65_536, 333_333, 700_001, len(CONTENT) - 1]
    server.answers[PATH] = [until(cut) for cut in cuts]
    path = fetch_file(server.url(PATH), config, digest=f"sha256:{SHA256}")
    assert path.read_bytes() == CONTENT
    # The last byte is requested again, to know that the server still means the same file.
    assert [asked.range for asked in server.asked] == [None, *(f"bytes={cut - 1}-" for cut in cuts)]
    assert server.num_bytes == len(CONTENT) + len(cuts)


def test_only_attempts_without_progress_count(server: LocalServer, config: DownloadConfig) -> None:
    config.retries = 1
    assert "503" in failure(server, config, until(10), until(20), until(30), status(503))
    server.answers[PATH] = [until(40), until(50), until(60)]
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT


def test_a_server_that_ignores_the_range_is_read_from_the_start(server: LocalServer, config: DownloadConfig) -> None:
    server.answers[PATH] = [until(400_000), body(CONTENT)]
    assert fetch_file(server.url(PATH), config, digest=f"sha256:{SHA256}").read_bytes() == CONTENT
    assert server.asked[1].range == "bytes=399999-"


def test_a_file_that_changed_between_two_pieces_is_read_from_the_start(
    server: LocalServer, config: DownloadConfig
) -> None:
    def cut_then_changed(handler: Handler) -> None:
        until(400_000)(handler)
        server.files[PATH] = CONTENT[::-1]

    server.answers[PATH] = [cut_then_changed]
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT[::-1]


def test_without_an_etag_or_a_date_the_file_is_read_from_the_start(server: LocalServer, config: DownloadConfig) -> None:
    def cut_without_etag(handler: Handler) -> None:
        handler.send(200, {"Content-Length": str(len(CONTENT))}, b"x" * 10)

    server.answers[PATH] = [cut_without_etag]
    assert fetch_file(server.url(PATH), config, digest=f"sha256:{SHA256}").read_bytes() == CONTENT
    assert [asked.range for asked in server.asked] == [None, None]


@pytest.mark.parametrize("content_range", ["bytes 0-9/1000000", "bytes 10-99/100", "bytes 10-", "bytes */1000000"])
def test_another_range_than_the_requested_one_is_not_used(
    server: LocalServer, config: DownloadConfig, content_range: str
) -> None:
    def other_piece(handler: Handler) -> None:
        handler.send(206, {"Content-Range": content_range, "Content-Length": "10"}, b"x" * 10)

    server.answers[PATH] = [until(10), other_piece]
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT


def test_a_range_that_cannot_be_served_starts_over(server: LocalServer, config: DownloadConfig) -> None:
    server.answers[PATH] = [until(10), status(416)]
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT


@pytest.mark.reliability
def test_g6_a_killed_download_resumes_where_it_was(server: LocalServer, config: DownloadConfig, tmp_path: Path) -> None:
    proceed = threading.Event()

    def half_then_wait(handler: Handler) -> None:
        handler.send(200, {"ETag": '"a"', "Content-Length": str(len(CONTENT))}, CONTENT[:500_000])
        proceed.wait(120)

    server.answers[PATH] = [half_then_wait]
    part = tmp_path / "net.pth.part"
    process = in_another_process(server.url(PATH), config.cache)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size > 100_000):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    proceed.set()
    kept = part.stat().st_size
    assert 100_000 < kept <= 500_000
    assert {path.name for path in tmp_path.iterdir()} == {"net.pth.part", "net.pth.part.json", "net.pth.lock"}
    server.answers[PATH] = [until_with_etag("a")]
    assert fetch_file(server.url(PATH), config, digest=f"sha256:{SHA256}").read_bytes() == CONTENT
    assert server.asked[1].range == f"bytes={kept - 1}-"
    assert server.num_bytes == 500_000 + len(CONTENT) - kept + 1


def until_with_etag(etag: str) -> Answer:
    """The rest of CONTENT if it is asked for with this ETag."""

    def answer(handler: Handler) -> None:
        assert handler.headers["If-Range"] == f'"{etag}"'
        start = int(handler.headers["Range"].removeprefix("bytes=").removesuffix("-"))
        piece = {"Content-Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"}
        handler.send(206, {**piece, "Content-Length": str(len(CONTENT) - start)}, CONTENT[start:])

    return answer


def test_a_complete_part_is_checked_with_the_server(
    server: LocalServer, config: DownloadConfig, tmp_path: Path
) -> None:
    path = fetch_file(server.url(PATH), config)
    etag = hashlib.sha256(CONTENT).hexdigest()[:8]
    path.rename(tmp_path / "net.pth.part")
    (tmp_path / "net.pth.part.json").write_text(f'{{"url": "{server.url(PATH)}", "validator": "\\"{etag}\\""}}')
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT
    assert server.num_bytes == len(CONTENT) + 1


# ---- bodies that are not the file


def test_a_body_shorter_than_announced_is_never_taken(server: LocalServer, config: DownloadConfig) -> None:
    config.retries = 2
    short = body(CONTENT[:100], Content_Length="1000")
    assert "cut after 100 of 1,000 bytes" in failure(server, config, *[short] * 4)
    assert len(server.asked) == 3


def test_a_body_without_a_recognisable_end_is_refused(server: LocalServer, config: DownloadConfig) -> None:
    def no_length(handler: Handler) -> None:
        handler.send(200, {}, CONTENT)

    assert "does not announce the length" in failure(server, config, no_length)


def test_an_empty_file_is_refused(server: LocalServer, config: DownloadConfig) -> None:
    assert "sent an empty file" in failure(server, config, body(b""))


@pytest.mark.parametrize(
    "page", [body(b"sorry", Content_Type="text/html; charset=utf-8"), body(b"\n<!DOCTYPE html><p>Log in first")]
)
def test_a_web_page_instead_of_the_file_is_refused_at_once(
    server: LocalServer, config: DownloadConfig, page: Answer
) -> None:
    assert "sent a web page instead of the file" in failure(server, config, page)
    assert len(server.asked) == 1


def test_a_web_page_does_not_cost_the_bytes_that_are_there(server: LocalServer, config: DownloadConfig) -> None:
    config.retries = 0
    failure(server, config, until(600_000))
    failure(server, config, body(b"<html>Log in first"))
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT
    assert server.asked[2].range == "bytes=599999-"


# ---- what the server says instead


def test_a_redirect_from_https_to_http_is_refused() -> None:
    response = requests.Response()
    response.status_code, response.url = 302, "https://a.org/net.pth"
    response.headers["Location"] = "http://me:secret@a.org/net.pth?token=secret"
    with pytest.raises(RefusedError, match=r"unsafe redirect to http://a\.org/net\.pth\?\.\.\."):
        SafeSession().get_redirect_target(response)
    response.headers["Location"] = "/other.pth"
    assert SafeSession().get_redirect_target(response) == "/other.pth"


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (ssl.SSLCertVerificationError(1, "certificate verify failed"), RefusedError),
        (socket.gaierror(socket.EAI_NONAME, ""), RefusedError),
        (socket.gaierror(socket.EAI_AGAIN, ""), TransientError),
        (ConnectionResetError(), TransientError),
    ],
)
def test_only_failures_that_may_pass_are_retried(cause: Exception, kind: type[Exception]) -> None:
    error = requests.ConnectionError("http://a.org/?token=secret")
    error.__context__ = cause
    classified = classify_error(error, timeout_s=1)
    assert isinstance(classified, kind) and "secret" not in str(classified)


def test_redirects_are_followed(server: LocalServer, config: DownloadConfig) -> None:
    server.answers["/old/net.pth"] = [status(302, Location="/older/net.pth")]
    server.answers["/older/net.pth"] = [status(308, Location=server.url(PATH))]
    assert fetch_file(server.url("/old/net.pth"), config).read_bytes() == CONTENT


def test_redirects_in_a_circle_end(server: LocalServer, config: DownloadConfig) -> None:
    server.answers[PATH] = [status(302, Location=PATH)] * 50
    with pytest.raises(DownloadError, match="too many redirects"):
        fetch_file(server.url(PATH), config)
    assert len(server.asked) < 40


@pytest.mark.parametrize("place", ["ftp://127.0.0.1/net.pth", "file:///etc/passwd"])
def test_a_redirect_to_another_protocol_is_refused(server: LocalServer, config: DownloadConfig, place: str) -> None:
    message = failure(server, config, status(302, Location=place))
    assert "HTTP 302" in message
    assert place in message
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_is_not_retried(server: LocalServer, config: DownloadConfig, code: int) -> None:
    assert f"{server.url(PATH)}: HTTP {code} " in failure(server, config, status(code))
    assert len(server.asked) == 1


@pytest.mark.parametrize("code", [408, 429, 500, 503])
def test_a_transient_status_is_retried(server: LocalServer, config: DownloadConfig, code: int) -> None:
    server.answers[PATH] = [status(code), status(code)]
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_the_time_between_attempts_doubles_unless_the_server_asks_for_more(
    server: LocalServer, config: DownloadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("semseg.storage.transfer.time.sleep", waits.append)
    config.delay_s = 1
    server.answers[PATH] = [status(500), status(500), status(429, Retry_After="30"), status(503, Retry_After="9999")]
    fetch_file(server.url(PATH), config)
    assert waits == [1, 2, 30, 60]


def test_silence_is_a_failure(server: LocalServer, config: DownloadConfig) -> None:
    proceed = threading.Event()
    config.timeout_s, config.retries = 0.2, 1

    def silent(handler: Handler) -> None:
        proceed.wait(120)

    message = failure(server, config, silent, silent)
    proceed.set()
    assert "no answer within 0.2 s (attempt 2, the last)" in message


def test_a_port_without_a_server_is_a_failure(config: DownloadConfig) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(DownloadError, match="no connection"):
        fetch_file(f"http://127.0.0.1:{port}/net.pth", config)


# ---- digests


@pytest.mark.reliability
@pytest.mark.parametrize(
    "digest",
    [
        f"sha256:{SHA256}",
        f"sha256:{SHA256[:8].upper()}",
        f"sha1:{hashlib.sha1(CONTENT).hexdigest()}",
        f"md5:{hashlib.md5(CONTENT).hexdigest()}",
    ],
)
def test_g6_each_kind_of_digest_is_checked(server: LocalServer, config: DownloadConfig, digest: str) -> None:
    fetch_file(server.url(PATH), config, digest=digest)
    (cache_folder(config) / "net.pth").unlink()
    server.files[PATH] = b"other"
    name, _, digits = digest.lower().partition(":")
    message = failure(server, config, digest=digest)
    assert hashlib.new(name, b"other").hexdigest() in message
    assert digits in message
    assert not list(cache_folder(config).glob("*.part"))


def test_a_file_without_a_digest_must_stay_what_it_was_the_first_time(
    server: LocalServer, config: DownloadConfig, capsys: pytest.CaptureFixture
) -> None:
    path = fetch_file(server.url(PATH), config)
    assert SHA256 in capsys.readouterr().out
    path.unlink()
    server.files[PATH] = b"other"
    message = failure(server, config)
    assert hashlib.sha256(b"other").hexdigest() in message
    assert SHA256 in message
    assert "net.pth.sha256" in message


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_the_record_and_a_record_of_sha256sum_counts(
    server: LocalServer, config: DownloadConfig
) -> None:
    path = fetch_file(server.url(PATH), config)
    record = path.with_name("net.pth.sha256")
    subprocess.run(["sha256sum", "--check", "--strict", record.name], cwd=path.parent, check=True)
    for rest in ("", '# {"size": 3}\n'):  # the second line: of earlier versions
        record.write_text(f"{SHA256}  net.pth\n{rest}")
        assert fetch_file(server.url(PATH), config) == path
        record.write_text(f"{'0' * 64}  net.pth\n{rest}")
        with pytest.raises(DownloadError, match=r"0 according to .*net\.pth\.sha256"):
            fetch_file(server.url(PATH), config)


@pytest.mark.parametrize("content", ["", "hello", SHA256[:-1] + "  net.pth\n"])
def test_a_damaged_record_is_reported(server: LocalServer, config: DownloadConfig, content: str) -> None:
    (cache_folder(config) / "net.pth.sha256").write_text(content)
    with pytest.raises(DownloadError, match=r"net\.pth\.sha256: contains no SHA-256"):
        fetch_file(server.url(PATH), config)


@pytest.mark.parametrize("digest", ["", f"sha256:{SHA256}"])
def test_a_file_that_changed_in_the_cache_is_not_used(server: LocalServer, config: DownloadConfig, digest: str) -> None:
    path = fetch_file(server.url(PATH), config, digest=digest)
    path.write_bytes(b"other")
    with pytest.raises(DownloadError) as error:
        fetch_file(server.url(PATH), config, digest=digest)
    assert SHA256 in str(error.value)
    assert hashlib.sha256(b"other").hexdigest() in str(error.value)
    assert path.read_bytes() == b"other"  # whose it is and how it came there is not known


def test_a_file_put_into_the_cache_by_hand_is_verified_and_used(config: DownloadConfig) -> None:
    path = cache_folder(config) / "net.pth"
    path.write_bytes(CONTENT)
    assert fetch_file("http://nowhere.invalid/net.pth", config, digest=f"sha256:{SHA256}") == path
    with pytest.raises(DownloadError, match="but should be 00000000"):
        fetch_file("http://nowhere.invalid/net.pth", config, digest="sha256:00000000")


def test_a_cache_that_can_only_be_read_will_do(config: DownloadConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("semseg.storage.download.atomic_write", read_only)
    monkeypatch.setattr("semseg.storage.download.FileLock", read_only)
    path = cache_folder(config) / "net.pth"
    path.write_bytes(CONTENT)
    assert fetch_file("http://nowhere.invalid/net.pth", config) == path
    with pytest.raises(DownloadError, match="Permission denied"):
        fetch_file("http://nowhere.invalid/other.pth", config)


@pytest.mark.parametrize("digest", ["sha512:00", "sha256:1234567", "sha1:11ad3fa6", "11ad3fa6", "md5:x"])
def test_a_digest_of_another_form_is_an_error_of_the_configuration(config: DownloadConfig, digest: str) -> None:
    with pytest.raises(ConfigError, match="must be sha256:<8 to 64 hex digits>"):
        fetch_file("http://127.0.0.1/net.pth", config, digest=digest)


# ---- mirrors, offline, messages


@pytest.mark.reliability
def test_g6_a_mirror_is_used_when_the_original_has_nothing(server: LocalServer, config: DownloadConfig) -> None:
    server.files["/mirror/2/net.pth"] = CONTENT
    config.mirrors = {server.url("/lost/"): [server.url("/mirror/1/"), server.url("/mirror/2/")], "http://other/": []}
    path = fetch_file(server.url("/lost/net.pth"), config, digest=f"sha256:{SHA256}")
    assert path.read_bytes() == CONTENT
    assert [asked.path for asked in server.asked] == ["/lost/net.pth", "/mirror/1/net.pth", "/mirror/2/net.pth"]


def test_an_error_lists_every_address_and_the_manual_way(server: LocalServer, config: DownloadConfig) -> None:
    config.mirrors = {server.url("/lost/"): [server.url("/mirror/"), "ftp://old.example/"]}
    server.answers["/mirror/net.pth"] = [body(b"<html>")]
    with pytest.raises(DownloadError) as error:
        fetch_file(server.url("/lost/net.pth"), config, folder="zoo", manual="or set ckpt=<file>")
    assert str(error.value).splitlines() == [
        f"net.pth could not be downloaded. {server.url('/lost/net.pth')}: HTTP 404 Not Found; "
        f"{server.url('/mirror/net.pth')}: HTTP 200, but the server sent a web page instead of the file "
        "(no content type); ftp://old.example/net.pth: only http:// and https:// addresses can be downloaded.",
        f"Download it by hand from {server.url('/lost/net.pth')} to {config.cache}/zoo/net.pth, or set ckpt=<file>.",
    ]


@pytest.mark.reliability
def test_g6_offline_opens_no_socket(
    server: LocalServer, config: DownloadConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch_file(server.url(PATH), config)

    def no_socket(*args: object, **options: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", no_socket)
    monkeypatch.setattr(socket, "create_connection", no_socket)
    config.offline = True
    assert fetch_file(server.url(PATH), config).read_bytes() == CONTENT
    with pytest.raises(DownloadError, match=rf"{config.cache}/other\.pth: not in the cache.*offline=true"):
        fetch_file(server.url("/other.pth"), config)


def test_passwords_are_sent_to_their_server_only_and_never_printed(
    server: LocalServer, config: DownloadConfig, capsys: pytest.CaptureFixture
) -> None:
    with local_server() as other:
        url = server.url("/old/net.pth").replace("//", "//me:secret@") + "?token=secret"
        server.answers["/old/net.pth?token=secret"] = [status(302, Location=other.url(PATH))]
        other.answers[PATH] = [status(500)]
        config.retries = 0
        with pytest.raises(DownloadError) as error:
            fetch_file(url, config)
        assert [asked.authorization for asked in server.asked + other.asked] == ["Basic bWU6c2VjcmV0", None]
    assert "secret" not in str(error.value) + "".join(capsys.readouterr())
    assert f"{server.url('/old/net.pth')}?...: HTTP 500" in str(error.value)


@pytest.mark.reliability
@pytest.mark.parametrize(
    "url", ["ftp://a.org/net.pth", "file:///etc/passwd", "net.pth", "http:///net.pth", "http://[/a"]
)
def test_g6_only_http_and_https_addresses_are_taken(config: DownloadConfig, url: str) -> None:
    with pytest.raises(DownloadError, match=r"only http:// and https:// addresses"):
        fetch_file(url, config)


@pytest.mark.parametrize(
    "url", ["http://a.org", "http://a.org/", "http://a.org/%2e%2e", "http://a.org/a%5Cb", "http://a.org/a%00"]
)
def test_an_address_must_end_in_the_name_of_a_file(config: DownloadConfig, url: str) -> None:
    with pytest.raises(DownloadError, match="does not end in the name of a file"):
        fetch_file(url, config)


def test_a_cache_that_cannot_be_written_is_reported(
    server: LocalServer, config: DownloadConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    config.cache = str(tmp_path / "file" / "cache")
    with pytest.raises(DownloadError, match=r"Not a directory.*download\.cache"):
        fetch_file(server.url(PATH), config)


# ---- many at once


@pytest.mark.reliability
def test_g6_processes_that_request_the_same_file_share_one_download(
    server: LocalServer, config: DownloadConfig
) -> None:
    both_asked = threading.Barrier(2, timeout=120)

    def slowly(handler: Handler) -> None:
        handler.send(200, {"Content-Length": str(len(CONTENT))}, CONTENT[:1000])
        both_asked.wait()
        handler.server.num_bytes += len(CONTENT) - 1000
        handler.wfile.write(CONTENT[1000:])

    server.answers[PATH] = [slowly]
    processes = [in_another_process(server.url(PATH), config.cache) for _ in range(2)]
    # One of them says that it waits; only then does the other get the rest.
    lines: list[str] = []
    readers = [threading.Thread(target=collect, args=(process, lines)) for process in processes]
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any("waiting" in line for line in lines):
        time.sleep(0.01)
    both_asked.wait()
    for reader in readers:
        reader.join()
    assert [process.wait() for process in processes] == [0, 0], lines
    assert lines.count(f"{config.cache}/net.pth\n") == 2
    assert len(server.asked) == 1
    assert server.num_bytes == len(CONTENT)


def collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
