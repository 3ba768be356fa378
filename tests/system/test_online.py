"""--check --online: real servers on loopback, each asked as a build or its guest would, and all problems at once."""

import logging
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from image_factory import online, pipeline
from image_factory.base.errors import ConfigurationError
from image_factory.configuration.files import Configuration
from image_factory.downloads import fetch
from image_factory.model import Plan

from .test_fetch import LARGE, File, Handler, RsyncDaemon, Server, redirect, rsync, server, status

__all__ = ["rsync", "server"]

REPOSITORY = Path(__file__).resolve().parents[2]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fetch, "_PROBE_SECONDS", 1.0)
    caplog.set_level(logging.INFO, logger="image-factory")


def plan_of(directory: Path, text: str, image: str = "x") -> Plan:
    (directory / "answers.cfg.j2").write_text(
        "d-i mirror/http/hostname string {{ mirror }} {{ proxy | default('') }}\n"
    )
    (directory / "own.conf").write_text(text.replace("ANSWERS", str(directory / "answers.cfg.j2")))
    (directory / "out").mkdir(exist_ok=True)
    flags = {"output-dir": str(directory / "out")}
    return pipeline.make_plan(Configuration({"IMAGE_FACTORY_CONFIG": str(directory / "own.conf")}), image, flags)


def problems(plan: Plan, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the lines of what is wrong."""
    caplog.clear()
    try:
        online.check(plan)
    except ConfigurationError as error:
        found = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert error.message == f"[{plan.image}] {len(found)} of what it needs from elsewhere can't be had."
        assert all("\n" not in line for line in found)
        return found
    return []


def by_path(**scripts: Callable[[Handler], None]) -> Callable[[Handler], None]:
    return lambda request: scripts.get(request.path.strip("/").partition("/")[0], status(404))(request)


def test_what_serves_is_not_fetched(
    server: Server, rsync: RsyncDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing of a file but its first byte is asked for, with a login and by redirections as in a build."""
    server.script = by_path(linux=redirect("/there"), there=File(LARGE), debian=redirect("/list"), list=File(b"<html>"))
    (rsync.root / "initrd").write_bytes(LARGE)
    uri = server.uri("/linux").replace("//", "//me:s3cret@")
    plan = plan_of(
        tmp_path,
        f"[x]\nlinux = {uri}\ninitrd = {rsync.uri('initrd')}\npreseed = ANSWERS\nmirror = {server.uri('/debian')}\n"
        f"homepage = {NOWHERE}/unused\nupload_destinations = here\n"
        f"[here]\nupload_type = rsync\nupload_target = {tmp_path}/up\n",
    )
    assert problems(plan, caplog) == []
    assert [request.path for request in server.requests] == ["/linux", "/there", "/debian", "/list"]
    assert server.ranges == ["bytes=0-0"] * 4
    assert server.requests[0].headers["authorization"]
    assert not (tmp_path / "up").exists()
    assert not (tmp_path / "cache").exists()


def test_all_problems_are_said_at_once(
    server: Server, rsync: RsyncDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One line for each mirror, for the guest's mirror and proxy, and for each upload target."""
    server.script = status(404)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        quiet = f"http://127.0.0.1:{silent.getsockname()[1]}"
        plan = plan_of(
            tmp_path,
            f"[x]\nlinux = {server.uri('/linux')} {NOWHERE}/linux\ninitrd = {rsync.uri('initrd')} {quiet}/initrd\n"
            f"preseed = ANSWERS\nmirror = http://10.0.2.2:{server.server_port}/debian\n"
            f"upload_destinations = closed, absent, here\n"
            f"[closed]\nupload_type = rsync\nupload_target = {rsync.uri('')}\n"
            "[absent]\nupload_type = rsync\nupload_target = rsync://127.0.0.1:9/up\n"
            f"[here]\nupload_type = rsync\nupload_target = {tmp_path}/up\n",
        )
        start = time.monotonic()
        found = problems(plan, caplog)
    assert time.monotonic() - start < 60
    assert found[0] == f"[x] linux: {server.uri('/linux')}: the server says 404 Not Found."
    assert found[1].startswith(f"[x] linux: {NOWHERE}/linux: ConnectionRefusedError")
    assert found[2].startswith(f"[x] initrd: {rsync.uri('initrd')}: rsync failed with status 23")
    assert found[3].startswith(f"[x] initrd: {quiet}/initrd: timed out: 0 bytes came")
    assert found[4] == f"[x] mirror: http://10.0.2.2:{server.server_port}/debian: the server says 404 Not Found."
    assert found[5].startswith(f"[closed] upload-target: {rsync.uri('')}: ") and "read only" in found[5]
    assert found[6].startswith("[absent] upload-target: rsync://127.0.0.1:9/up: ")
    assert len(found) == 7


def test_login_page_is_no_kernel(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server.script = File(b"<html>", headers={"content_type": "text/html; charset=utf-8"})
    plan = plan_of(tmp_path, f"[x]\nlinux = {server.uri()}\ninitrd = /dev/null\n")
    assert problems(plan, caplog) == [f"[x] linux: {server.uri()}: a web page came instead of the file."]


def test_secrets_are_not_shown(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, f"[x]\nlinux = {NOWHERE.replace('//', '//me:s3cret@')}/linux?token=s3cret\ninitrd = /i\n")
    (line,) = problems(plan, caplog)
    assert line.startswith("[x] linux: http://***@127.0.0.1:9/linux?token=***: ")
    assert "s3cret" not in line


@pytest.mark.parametrize("number", [200, 407, 501])
def test_guest_goes_by_its_own_proxy(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Not by this machine's; and a proxy is one whatever it answers for itself."""
    monkeypatch.setenv("http_proxy", NOWHERE)
    monkeypatch.delenv("no_proxy", raising=False)
    server.script = status(number)
    guest = f"[x]\nlinux = /l\ninitrd = /i\npreseed = ANSWERS\nmirror = {server.uri('/debian')}\n"
    plan = plan_of(tmp_path, f"{guest}proxy = {server.uri('')}\n")
    assert problems(plan, caplog) == []
    assert [request.path for request in server.requests] == ["/"]
    server.script = status(200)
    plan = plan_of(tmp_path, guest.replace("/l\n", f"{server.uri()}\n"))
    (line,) = problems(plan, caplog)
    assert line.startswith(f"[x] linux: {server.uri()}: ")


def test_offline_build_asks_no_mirror_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, f"[x]\nlinux = {NOWHERE}/linux\ninitrd = /i\noffline = yes\n")
    assert problems(plan, caplog) == []


def test_shipped_recipe(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its kernel, its initrd, and the mirror that its template names to the guest."""
    server.script = lambda request: (status(404) if request.path.endswith("initrd.gz") else File(LARGE))(request)
    text = (REPOSITORY / "data/image-factory.conf").read_text()
    text += f"[mine]\nbased-on = Debian-13-server\ndebian_mirror = {server.uri('/debian')}\n"
    plan = plan_of(tmp_path, text.replace("${data_dir}", str(REPOSITORY / "data")), image="mine")
    (line,) = problems(plan, caplog)
    assert line.startswith("[mine] initrd: ") and line.endswith("initrd.gz: the server says 404 Not Found.")
    asked = [request.path for request in server.requests]
    assert [path.rpartition("/")[2] for path in asked] == ["linux", "initrd.gz", "debian"]


def test_online_goes_with_check() -> None:
    done = subprocess.run(
        ["/usr/bin/python3", REPOSITORY / "image-factory", "x", "--online"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "image-factory: error: --online goes with --check." in done.stderr
