"""Machines out of namespaces: a small network of hosts with SSH, on this machine, with no way out of it.

A `Lab` is a switch and the machine of whoever sits at it; `Host`s are plugged into it while it runs. Each has
its own network, processes, IPC, name and root folder: what is written there lies in memory above this
machine's files and is gone with it. /tmp, /root, /run and /dev/shm are empty at first. The interpreter that
runs this, and what else is to be `seen`, is there under the same path, to read only. All have this machine's
kernel, CPUs and memory.

Run as a program it is process 1 of one of them. It ends, and the kernel ends all that is there, when the
process that made it does.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from events import LIMIT_SECONDS, until

if TYPE_CHECKING:
    import psutil

SPACES = {"net": "--net", "mnt": "--mount", "pid": "--pid", "ipc": "--ipc", "uts": "--uts"}
PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "rsync": "rsync",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "pivot_root": "util-linux",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VENV = Path(sys.prefix)
ROOT = Path(__file__).parents[2]
EMPTY = ("/tmp", "/root", "/run", "/dev/shm")
POSTGRESQL = ("/var/lib/postgresql", "/etc/postgresql", "/var/log/postgresql")
MOUNT = "lab-of-the-tests"  # what the overlays are called in lists of mounts
_LIBC = ctypes.CDLL(None, use_errno=True)  # Python has setns from 3.12 on


def lacking() -> str:
    """Why there can be no lab on this machine, and what to do about it; empty when there can."""
    if os.geteuid() != 0:
        return "a lab of network namespaces needs root"
    missing = {package for program, package in PROGRAMS.items() if _find(program) is None}
    if missing:
        return f"a lab needs {' '.join(sorted(missing))}: apt-get install {' '.join(sorted(missing))}"
    overlay = f"mount -t tmpfs {MOUNT} /mnt && mkdir /mnt/a /mnt/b /mnt/c && "
    overlay += "mount -t overlay x -o lowerdir=/,upperdir=/mnt/a,workdir=/mnt/b /mnt/c"
    tried = subprocess.run([*_unshare(), "sh", "-c", overlay], capture_output=True, text=True, check=False)
    if tried.returncode:
        return (
            f"a lab needs namespaces and overlay mounts of its own ({tried.stderr.strip()}); in a container: "
            "docker run --privileged"
        )
    return ""


def lacks_postgresql() -> str:
    """Why no host can have PostgreSQL; empty when one can."""
    if shutil.which("pg_createcluster") is None or shutil.which("pg_ctlcluster") is None:
        return "PostgreSQL as Debian and Ubuntu package it is missing: apt-get install postgresql"
    return ""


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def _unshare() -> list[str]:
    return ["unshare", *SPACES.values(), "--fork", "--kill-child", "--propagation", "private"]


@dataclass(frozen=True)
class Plan:
    """What process 1 of a machine makes before anything else runs on it."""

    name: str
    empty: Sequence[str] = EMPTY
    """Folders that are in memory, and empty at first."""
    seen: Mapping[str, str] = field(default_factory=dict)
    """Folders of outside, to read only, by where they are here."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """The same, to write."""


class CommandError(AssertionError):
    """A command that did not end well. Its text is what the command has said."""


class Machine:
    """Runs from when it is made until `kill`."""

    def __init__(self, plan: Plan) -> None:
        self.name = plan.name
        command = [*_unshare(), sys.executable, __file__, json.dumps(asdict(plan))]
        self._unshare = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
        )
        assert self._unshare.stdout is not None
        said = self._unshare.stdout.readline()
        assert said == b"ready\n", f"{self.name} did not start"
        me = self._unshare.pid
        self.pid = int(Path(f"/proc/{me}/task/{me}/children").read_text())
        """Of its process 1, as this machine counts."""
        self.spaces = {space: os.readlink(f"/proc/{self.pid}/ns/{space}") for space in SPACES}
        self._before: list[psutil.Process] = []
        """What ran on it when it was killed."""

    def path(self, there: str) -> Path:
        """Where a file of this machine is for the process that made it, to read and to write."""
        return Path(f"/proc/{self.pid}/root{there}")

    def start(
        self, *command: str, output: IO[Any] | int | None = None, cwd: str = "/", **environment: str
    ) -> subprocess.Popen[bytes]:
        """Starts a command as root. It knows no variables of outside; the interpreter's folder is the first
        in its PATH."""
        variables = {"HOME": "/root", "USER": "root", "LOGNAME": "root", "TERM": "dumb", "LANG": "C.UTF-8"}
        variables |= {"PATH": f"{VENV}/bin:{SYSTEM_PATH}", **environment}
        bare = ["env", "-i", "-C", cwd, *(f"{key}={value}" for key, value in variables.items())]
        enter = ["nsenter", "-t", str(self.pid), *SPACES.values(), "--", *bare, *command]
        return subprocess.Popen(
            enter, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )

    def run(
        self,
        *command: str,
        timeout: float = LIMIT_SECONDS,
        check: bool = True,
        cwd: str = "/",
        **environment: str,
    ) -> str:
        """Return what the command prints on both its outputs. Raises CommandError when it fails."""
        # To a file: SSH leaves a process behind that would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            process = self.start(*command, output=output, cwd=cwd, **environment)
            try:
                code: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"not within {timeout:g} s"
            output.seek(0)
            said = output.read().decode(errors="replace")
        if check and code != 0:
            raise CommandError(f"{self.name}: {' '.join(command)[:200]}: {code}\n{said}")
        return said

    def network(self) -> ThreadPoolExecutor:
        """A thread of this process whose sockets are in the machine's network."""

        def enter() -> None:
            with open(f"/proc/{self.pid}/ns/net") as space:
                if _LIBC.setns(space.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"the network of {self.name} cannot be entered")

        return ThreadPoolExecutor(1, f"in-{self.name}", enter)

    def processes(self) -> dict[int, str]:
        """Command lines of all that runs on it, by number as this machine counts, but for process 1."""
        found = {}
        for pid in _inside({"pid": self.spaces["pid"]}):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and pid != self.pid:  # zombies have none
                    found[pid] = line.strip()
        return found

    def kill(self) -> None:
        """As if its power was cut: nothing on it ends in order."""
        import psutil

        if self._unshare.returncode is not None:  # its number may be another process's by now
            return
        for pid in _inside(self.spaces):
            with suppress(psutil.Error):
                self._before.append(psutil.Process(pid))
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()
        for pipe in (self._unshare.stdin, self._unshare.stdout):
            assert pipe is not None
            pipe.close()

    def left(self) -> list[str]:
        """Processes that should have died with it."""
        import psutil

        found = []
        for process in self._before:
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {process.name()} of {self.name}")
        return found


class Host(Machine):
    """A machine at an address of the lab, with SSH for root and the lab's key."""

    def __init__(self, plan: Plan, address: str) -> None:
        super().__init__(plan)
        self.address = address

    def installed(self, folder: str = "/root/venv") -> None:
        """Makes the interpreter's environment look as if set-up had installed the project in `folder`."""
        there = self.path(folder)
        there.mkdir(parents=True)
        for part in VENV.iterdir():
            (there / part.name).symlink_to(part)
        (there / "finished").touch()

    def has_postgresql(self) -> None:
        """As Debian's package leaves it: a cluster with its defaults, which is not started yet. For a host
        where the folders POSTGRESQL are empty."""
        for folder in POSTGRESQL:
            self.run("chown", "postgres:postgres", folder)
        newest = max(Path("/usr/lib/postgresql").iterdir(), key=lambda path: float(path.name))
        self.run("pg_createcluster", newest.name, "main")


class Lab(Machine):
    """`seen`: further folders of this machine that the lab's own machine sees. `shared`: a folder that is
    /shared on all hosts."""

    KEY = "/root/lab.pem"

    def __init__(
        self, subnet: str = "10.77.0.0/24", seen: Sequence[Path] = (), shared: Path | None = None
    ) -> None:
        self.subnet = ipaddress.ip_network(subnet)
        self.address = str(self.subnet[-2])
        self.shared = shared
        self.hosts: dict[str, Host] = {}
        self._all: list[Machine] = [self]
        super().__init__(Plan("lab", seen=_interpreter() | {str(path): str(path) for path in seen}))
        self.run("ip", "link", "add", "switch", "type", "bridge")
        self.run("ip", "address", "add", self._with_prefix(self.address), "dev", "switch")
        self.run("ip", "link", "set", "switch", "up")
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", self.KEY)
        self._name_all()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _with_prefix(self, address: str) -> str:
        return f"{address}/{self.subnet.prefixlen}"

    def host(self, name: str, address: str, empty: Sequence[str] = ()) -> Host:
        """A further host. `name`: up to 11 characters. `empty`: further folders that are in memory, and empty
        at first."""
        assert name not in self.hosts, f"{name} is there already"
        assert ipaddress.ip_address(address) in self.subnet, f"{address} is not in {self.subnet}"
        shared = {"/shared": str(self.shared)} if self.shared else {}
        host = Host(Plan(name, (*EMPTY, *_projects(), *empty), _interpreter(), shared), address)
        self.hosts[name] = host
        self._all.append(host)
        # Only with the lab's network: with its processes, too, the host's number would mean another one.
        for command in (
            f"link add to-{name} type veth peer name of-{name}",
            f"link set of-{name} netns {host.pid} name eth0",
            f"link set to-{name} master switch up",
        ):
            subprocess.run(["nsenter", "-t", str(self.pid), "--net", "ip", *command.split()], check=True)
        # The others may remember who had the address before.
        host.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify")
        host.run("ip", "address", "add", self._with_prefix(address), "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        self._name_all()
        self._serve_ssh(host)
        self._hear(host)
        return host

    def cut(self, host: Host) -> None:
        """Pulls its plug out: it lives on, and nobody hears of it."""
        self.run("ip", "link", "set", f"to-{host.name}", "down")

    def mend(self, host: Host) -> None:
        """Puts its plug in again."""
        self.run("ip", "link", "set", f"to-{host.name}", "up")
        self._hear(host)

    def _hear(self, host: Host) -> None:
        """Waits until the lab's own machine reaches it: the kernel takes its time to use a link that has come
        up, remembers who had an address before, and does not look at once again for who was looked for in
        vain."""

        def is_heard() -> bool:
            self.run("ip", "neighbour", "flush", "dev", "switch")
            with suppress(CommandError):
                self.run("bash", "-c", f"echo > /dev/tcp/{host.address}/22", timeout=10)
                return True
            return False

        until(is_heard, lambda: f"{host.name} is not heard")

    def kill_host(self, host: Host) -> None:
        """It is gone, with its files; another may take its name and address."""
        del self.hosts[host.name]
        host.kill()
        self.run("ip", "link", "delete", f"to-{host.name}", check=False)  # the kernel does it too, later
        self._name_all()

    def close(self) -> None:
        """Ends all. Raises AssertionError when something is left."""
        for machine in reversed(self._all):
            machine.kill()

        def left() -> list[str]:
            return [line for machine in self._all for line in machine.left()]

        until(lambda: not left(), lambda: f"the lab has left {left()}")
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if MOUNT in line]
        assert not mounts, f"the lab has left {mounts}"

    def _name_all(self) -> None:
        everybody = [(self.address, self.name), *((h.address, h.name) for h in self.hosts.values())]
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in everybody)]
        for machine in (self, *self.hosts.values()):
            machine.path("/etc/hosts").write_text("\n".join(lines) + "\n")

    def _serve_ssh(self, host: Host) -> None:
        home = host.path("/root")
        shutil.copytree("/etc/skel", home, dirs_exist_ok=True)
        (home / ".ssh").mkdir(mode=0o700)
        (home / ".ssh" / "authorized_keys").write_bytes(self.path(f"{self.KEY}.pub").read_bytes())
        host.path("/run/sshd").mkdir(mode=0o755)
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/host_key")
        options = {
            "ListenAddress": host.address,
            "HostKey": "/run/host_key",
            "PidFile": "/run/sshd.pid",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",  # with it an account without a password, as root's is in containers, is closed
            "MaxStartups": "50:30:100",
            "MaxSessions": "50",
        }
        host.path("/run/sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))
        host.run("/usr/sbin/sshd", "-f", "/run/sshd_config", "-E", "/run/sshd.log")  # comes back listening


def _interpreter() -> dict[str, str]:
    return {path: path for path in (str(VENV), sys.base_prefix)}


def _projects() -> list[str]:
    """This one's folder and the one that the interpreter's environment belongs to: what a host runs of it
    must have been sent there."""
    return [str(path) for path in {ROOT, VENV.parent} if (path / "pyproject.toml").exists()]


def _inside(spaces: Mapping[str, str]) -> list[int]:
    """Processes in any of these namespaces."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(folder / "ns" / space) == number for space, number in spaces.items()):
                found.append(int(folder.name))
    return found


# -- process 1


def _be_the_first(plan: Plan) -> None:
    socket.sethostname(plan.name)
    _run("ip", "link", "set", "lo", "up")
    _build(plan)
    signal.signal(signal.SIGCHLD, _reap)
    print("ready", flush=True)
    sys.stdin.buffer.read()  # until whoever made it is gone


def _build(plan: Plan) -> None:
    """A root folder above this machine's, and what is mounted in it."""
    base = Path("/mnt")
    _run("mount", "-t", "tmpfs", MOUNT, str(base))
    upper, scratch, root = (base / name for name in ("upper", "scratch", "root"))
    for folder in (upper, scratch, root):
        folder.mkdir(mode=0o755)
    overlay = f"lowerdir=/,upperdir={upper},workdir={scratch}"
    _run("mount", "-t", "overlay", MOUNT, "-o", overlay, str(root))

    def at(there: str) -> str:
        folder = root / there.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    _run("mount", "-t", "proc", "proc", at("/proc"))
    _run("mount", "-t", "sysfs", "sysfs", at("/sys"))
    _run("mount", "--rbind", "/dev", at("/dev"))
    _run("mount", "-t", "devpts", "-o", "newinstance,ptmxmode=0666,mode=0620,gid=5", "devpts", at("/dev/pts"))
    for there in plan.empty:
        like = os.stat(at(there)).st_mode & 0o7777
        _run("mount", "-t", "tmpfs", "-o", f"size=4g,mode={like:o}", MOUNT, at(there))
    for there, here in {**plan.seen, **plan.shared}.items():
        _run("mount", "--bind", here, at(there))
        if there in plan.seen:
            _run("mount", "-o", "remount,bind,ro", at(there))
    os.chdir(root)
    _run("pivot_root", ".", ".")
    _run("umount", "-l", ".")
    os.chdir("/")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def _reap(*_: object) -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


if __name__ == "__main__":
    _be_the_first(Plan(**json.loads(sys.argv[1])))
