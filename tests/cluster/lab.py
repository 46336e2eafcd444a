"""A network of hosts with SSH, made of namespaces of this machine and without access to other networks.

A `Lab` is a switch with a machine of its own, on which the tests run commands. `Host`s can be connected to
the switch at any time. Each machine of a lab has its own network, processes, IPC, host name and root folder.
The root folder shows this machine's files; files that are written there are kept in memory and are lost when
the lab's machine ends. /tmp, /root, /run and /dev/shm are empty at first. The interpreter of the tests, and
further folders on request, are visible under the same path and read-only. All machines use this machine's
kernel, CPUs and memory. "Outside" means: on this machine, not on the machines of a lab.

The kernel ends all processes of a lab's machine when the process that created the machine ends.
"""

from __future__ import annotations

import ctypes
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import lab_init
from events import LIMIT_SECONDS, until
from lab_init import EMPTY_FOLDERS, MOUNT, Plan

if TYPE_CHECKING:
    import psutil

NAMESPACES = {"net": "--net", "mnt": "--mount", "pid": "--pid", "ipc": "--ipc", "uts": "--uts"}
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
POSTGRESQL = ("/var/lib/postgresql", "/etc/postgresql", "/var/log/postgresql")
_LIBC = ctypes.CDLL(None, use_errno=True)  # for setns; Python's own os.setns needs 3.12


def missing_requirements() -> str:
    """Return why this machine cannot run a lab, with the remedy, or an empty string if it can."""
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
    """Return why hosts cannot run PostgreSQL, with the remedy, or an empty string if they can."""
    if shutil.which("pg_createcluster") is None or shutil.which("pg_ctlcluster") is None:
        return "the PostgreSQL of Debian and Ubuntu is missing: apt-get install postgresql"
    return ""


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def _unshare() -> list[str]:
    return ["unshare", *NAMESPACES.values(), "--fork", "--kill-child", "--propagation", "private"]


class CommandError(AssertionError):
    """Failure of a command, with the command's output in the message."""


class Machine:
    """A machine that runs from its creation until `kill`."""

    def __init__(self, plan: Plan) -> None:
        self.name = plan.name
        command = [*_unshare(), sys.executable, lab_init.__file__, json.dumps(asdict(plan))]
        self._unshare = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
        )
        assert self._unshare.stdout is not None
        output = self._unshare.stdout.readline()
        assert output == b"ready\n", f"{self.name} did not start"
        parent = self._unshare.pid
        self.pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())
        """Process id of the machine's process 1, as seen from outside."""
        self.namespaces = {name: os.readlink(f"/proc/{self.pid}/ns/{name}") for name in NAMESPACES}
        self._killed: list[psutil.Process] = []
        """The processes that were running on the machine when it was killed."""

    def path(self, path: str) -> Path:
        """Return the path under which processes outside can read and write a file of the machine."""
        return Path(f"/proc/{self.pid}/root{path}")

    def start(
        self, *command: str, output: IO[Any] | int | None = None, cwd: str = "/", **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a command as root.

        The command inherits no environment variables. Its PATH begins with the interpreter's folder.
        """
        variables = {"HOME": "/root", "USER": "root", "LOGNAME": "root", "TERM": "dumb", "LANG": "C.UTF-8"}
        variables |= {"PATH": f"{VENV}/bin:{SYSTEM_PATH}", **environment}
        bare = ["env", "-i", "-C", cwd, *(f"{key}={value}" for key, value in variables.items())]
        enter = ["nsenter", "-t", str(self.pid), *NAMESPACES.values(), "--", *bare, *command]
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
        """Run a command, and return its stdout and stderr. Raises CommandError if the command fails."""
        # The output goes to a file: SSH leaves a process behind that would keep a pipe open.
        with tempfile.TemporaryFile() as output:
            process = self.start(*command, output=output, cwd=cwd, **environment)
            try:
                code: int | str = process.wait(timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                code = f"not within {timeout:g} s"
            output.seek(0)
            text = output.read().decode(errors="replace")
        if check and code != 0:
            raise CommandError(f"{self.name}: {' '.join(command)[:200]}: {code}\n{text}")
        return text

    def network(self) -> ThreadPoolExecutor:
        """Return an executor with one thread of this process, whose sockets are in the machine's network."""

        def enter() -> None:
            with open(f"/proc/{self.pid}/ns/net") as space:
                if _LIBC.setns(space.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"the network of {self.name} cannot be entered")

        return ThreadPoolExecutor(1, f"in-{self.name}", enter)

    def processes(self) -> dict[int, str]:
        """Return the command lines of all processes except process 1, by their outside process ids."""
        found = {}
        for pid in _processes_in({"pid": self.namespaces["pid"]}):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if line and pid != self.pid:  # the command line of a zombie is empty
                    found[pid] = line.strip()
        return found

    def kill(self) -> None:
        """Kill all processes of the machine at once, as a power cut does."""
        import psutil

        if self._unshare.returncode is not None:  # already killed: another process may have the id by now
            return
        for pid in _processes_in(self.namespaces):
            with suppress(psutil.Error):
                self._killed.append(psutil.Process(pid))
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()
        for pipe in (self._unshare.stdin, self._unshare.stdout):
            assert pipe is not None
            pipe.close()

    def survivors(self) -> list[str]:
        """Return the processes that should have ended with the machine."""
        import psutil

        found = []
        for process in self._killed:
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(f"{process.pid} {process.name()} of {self.name}")
        return found


class Host(Machine):
    """A machine with an address in the lab, which admits root by SSH with the lab's key."""

    def __init__(self, plan: Plan, address: str) -> None:
        super().__init__(plan)
        self.address = address

    def install_environment(self, folder: str = "/root/venv") -> None:
        """Link the interpreter's environment into `folder`, as if set-up had installed the project there."""
        environment = self.path(folder)
        environment.mkdir(parents=True)
        for part in VENV.iterdir():
            (environment / part.name).symlink_to(part)
        (environment / "finished").touch()

    def create_postgresql(self) -> None:
        """Create, but do not start, a database cluster as Debian's package does.

        The host's folders in `POSTGRESQL` must be empty.
        """
        for folder in POSTGRESQL:
            self.run("chown", "postgres:postgres", folder)
        newest = max(Path("/usr/lib/postgresql").iterdir(), key=lambda path: float(path.name))
        self.run("pg_createcluster", newest.name, "main")


class Lab(Machine):
    """A switch with a machine of its own.

    Args:
        subnet: The subnet with the addresses of the lab.
        read_only: Further folders of this machine that the lab's own machine can read.
        shared: A folder of this machine that all hosts see as /shared.
    """

    KEY = "/root/lab.pem"

    def __init__(
        self, subnet: str = "10.77.0.0/24", read_only: Sequence[Path] = (), shared: Path | None = None
    ) -> None:
        self.subnet = ipaddress.ip_network(subnet)
        self.address = str(self.subnet[-2])
        self.shared = shared
        self.hosts: dict[str, Host] = {}
        self._machines: list[Machine] = [self]
        folders = {str(path): str(path) for path in read_only}
        super().__init__(Plan("lab", read_only=_interpreter_folders() | folders))
        self.run("ip", "link", "add", "switch", "type", "bridge")
        self.run("ip", "address", "add", self._with_prefix(self.address), "dev", "switch")
        self.run("ip", "link", "set", "switch", "up")
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", self.KEY)
        self._write_hosts_files()

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _with_prefix(self, address: str) -> str:
        return f"{address}/{self.subnet.prefixlen}"

    def host(self, name: str, address: str, empty: Sequence[str] = ()) -> Host:
        """Add a host.

        Args:
            name: Host name of at most 11 characters.
            address: Address in the subnet.
            empty: Further folders that are in memory and empty at first.
        """
        assert name not in self.hosts, f"{name} exists already"
        assert ipaddress.ip_address(address) in self.subnet, f"{address} is not in {self.subnet}"
        shared = {"/shared": str(self.shared)} if self.shared else {}
        host = Host(
            Plan(name, (*EMPTY_FOLDERS, *_project_folders(), *empty), _interpreter_folders(), shared), address
        )
        self.hosts[name] = host
        self._machines.append(host)
        # Enter the lab's network namespace only: in its process namespace, the host has another process id.
        for command in (
            f"link add to-{name} type veth peer name of-{name}",
            f"link set of-{name} netns {host.pid} name eth0",
            f"link set to-{name} master switch up",
        ):
            subprocess.run(["nsenter", "-t", str(self.pid), "--net", "ip", *command.split()], check=True)
        # Announce the address: other machines may remember the host that had it before.
        host.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/conf/eth0/arp_notify")
        host.run("ip", "address", "add", self._with_prefix(address), "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        self._write_hosts_files()
        self._start_ssh_server(host)
        self._wait_until_reachable(host)
        return host

    def disconnect(self, host: Host) -> None:
        """Unplug the host from the switch. The host keeps running."""
        self.run("ip", "link", "set", f"to-{host.name}", "down")

    def reconnect(self, host: Host) -> None:
        """Plug the host in again."""
        self.run("ip", "link", "set", f"to-{host.name}", "up")
        self._wait_until_reachable(host)

    def _wait_until_reachable(self, host: Host) -> None:
        """Wait until the lab's own machine reaches the host.

        The kernel does not use a new link at once, remembers which host had an address before, and delays a
        second search for an address that it did not find.
        """

        def is_reachable() -> bool:
            self.run("ip", "neighbor", "flush", "dev", "switch")
            with suppress(CommandError):
                self.run("bash", "-c", f"echo > /dev/tcp/{host.address}/22", timeout=10)
                return True
            return False

        until(is_reachable, lambda: f"{host.name} cannot be reached")

    def kill_host(self, host: Host) -> None:
        """Kill the host and delete its files. Its name and address can be used again."""
        del self.hosts[host.name]
        host.kill()
        self.run("ip", "link", "delete", f"to-{host.name}", check=False)  # the kernel deletes it later
        self._write_hosts_files()

    def close(self) -> None:
        """Kill all machines. Raises AssertionError if processes or mounts are left over."""
        for machine in reversed(self._machines):
            machine.kill()

        def survivors() -> list[str]:
            return [line for machine in self._machines for line in machine.survivors()]

        until(lambda: not survivors(), lambda: f"the lab has left {survivors()}")
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if MOUNT in line]
        assert not mounts, f"the lab has left {mounts}"

    def _write_hosts_files(self) -> None:
        machines = [(self.address, self.name), *((h.address, h.name) for h in self.hosts.values())]
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for address, name in machines)]
        for machine in (self, *self.hosts.values()):
            machine.path("/etc/hosts").write_text("\n".join(lines) + "\n")

    def _start_ssh_server(self, host: Host) -> None:
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
            "UsePAM": "no",  # in containers, root has no password, and PAM refuses such an account
            "MaxStartups": "50:30:100",
            "MaxSessions": "50",
        }
        host.path("/run/sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))
        host.run("/usr/sbin/sshd", "-f", "/run/sshd_config", "-E", "/run/sshd.log")  # waits until it listens


def _interpreter_folders() -> dict[str, str]:
    return {path: path for path in (str(VENV), sys.base_prefix)}


def _project_folders() -> list[str]:
    """Return the folders that hosts do not see, so that hosts run the sources that were sent to them.

    These folders are this file's project and the project to which the interpreter's environment belongs.
    """
    return [str(path) for path in {ROOT, VENV.parent} if (path / "pyproject.toml").exists()]


def _processes_in(namespaces: Mapping[str, str]) -> list[int]:
    """Return the ids of all processes in any of these namespaces."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if any(os.readlink(folder / "ns" / name) == number for name, number in namespaces.items()):
                found.append(int(folder.name))
    return found
