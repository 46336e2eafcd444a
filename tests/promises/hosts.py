"""A network of machines with SSH, made of Linux namespaces of this machine, without access to other networks.

A `Network` is a switch and the machine of a user, on which the tests type commands; `Host`s are connected to
the switch. Each machine has its own network, processes, IPC, host name and root folder. The root folder shows
this machine's files; changes are kept in memory and lost with the machine. /tmp, /root, /run and /dev/shm are
initially empty. All machines use this machine's kernel, CPUs and memory. "Outside" means: on this machine.

The kernel ends all processes of a machine when the process that created the machine ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import host_init
from as_a_user import HANG_SECONDS
from host_init import MOUNT, Plan

NAMESPACES = {"net": "--net", "mnt": "--mount", "pid": "--pid", "ipc": "--ipc", "uts": "--uts"}
PROGRAMS = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "rsync": "rsync",
    "ip": "iproute2",
    "unshare": "util-linux",
    "mount": "mount",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
VENV = Path(sys.prefix)
ROOT = Path(__file__).parents[2]


def missing_requirements() -> str:
    """Return why this machine cannot run such a network, with the remedy; empty if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    path = f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"
    missing = {package for program, package in PROGRAMS.items() if shutil.which(program, path=path) is None}
    if missing:
        return f"apt-get install {' '.join(sorted(missing))}"
    overlay = f"mount -t tmpfs {MOUNT} /mnt && mkdir /mnt/a /mnt/b /mnt/c && "
    overlay += "mount -t overlay x -o lowerdir=/,upperdir=/mnt/a,workdir=/mnt/b /mnt/c"
    tried = subprocess.run([*_unshare(), "sh", "-c", overlay], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no overlay mounts in namespaces ({tried.stderr.strip()}); docker run --privileged"
    return ""


def until(happened: Callable[[], object], otherwise: Callable[[], object] = str) -> None:
    """Wait until `happened` returns a true value. If it never does, fail with the text from `otherwise`."""
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"did not happen within {HANG_SECONDS:g} s\n{otherwise()}"
        time.sleep(0.1)


class Command:
    """A command that runs on a machine as root. It inherits no environment variables."""

    def __init__(
        self, machine: Machine, words: tuple[str, ...], cwd: str, environment: dict[str, str]
    ) -> None:
        variables = {"HOME": "/root", "USER": "root", "LOGNAME": "root", "TERM": "dumb", "LANG": "C.UTF-8"}
        variables |= {"PATH": f"{VENV}/bin:{SYSTEM_PATH}", **environment}
        bare = ["env", "-i", "-C", cwd, *(f"{key}={value}" for key, value in variables.items())]
        enter = ["nsenter", "-t", str(machine.pid), *NAMESPACES.values(), "--"]
        # The output goes to a file: SSH leaves a process behind that would keep a pipe open.
        self._output: IO[Any] = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the command is known)
        self.words = words
        self.process = subprocess.Popen(
            [*enter, *bare, *words],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
        )

    def output(self) -> str:
        """Return what the command has printed so far."""
        size = os.fstat(self._output.fileno()).st_size
        return os.pread(self._output.fileno(), size, 0).decode(errors="replace")

    def has_ended(self) -> bool:
        """Return whether the command has ended."""
        return self.process.poll() is not None

    def until(self, happened: Callable[[], object]) -> None:
        """Wait until `happened` returns a true value; fail if the command ends first."""
        until(lambda: happened() or self.has_ended(), self.output)
        assert happened(), f"{self.words} ended first:\n{self.output()}"

    def kill(self) -> None:
        """End the command and all processes that it has started on its machine."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self, code: int | None = 0) -> str:
        """Wait until the command ends, check its exit code (None: any), and return its output."""
        try:
            found = self.process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise AssertionError(f"{self.words} does not end:\n{self.output()}") from None
        assert code is None or found == code, f"{self.words}: exit {found}\n{self.output()}"
        return self.output()


class Machine:
    """A machine that runs from its creation until `kill`."""

    def __init__(self, plan: Plan) -> None:
        self.name = plan.name
        command = [*_unshare(), sys.executable, host_init.__file__, json.dumps(asdict(plan))]
        self._unshare = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, cwd="/"
        )
        assert self._unshare.stdout is not None
        assert self._unshare.stdout.readline() == b"ready\n", f"{self.name} did not start"
        parent = self._unshare.pid
        self.pid = int(Path(f"/proc/{parent}/task/{parent}/children").read_text())
        """Process id of the machine's process 1, as seen from outside."""
        self._processes = os.readlink(f"/proc/{self.pid}/ns/pid")

    def path(self, path: str) -> Path:
        """Return the path under which processes outside read and write a file of the machine."""
        return Path(f"/proc/{self.pid}/root{path}")

    def start(self, *words: str, cwd: str = "/", **environment: str) -> Command:
        """Start a command in the folder `cwd`, with environment variables."""
        return Command(self, words, cwd, environment)

    def run(self, *words: str, cwd: str = "/", **environment: str) -> str:
        """Run a command that must succeed, and return its output."""
        return self.start(*words, cwd=cwd, **environment).wait()

    def processes(self) -> list[str]:
        """Return the command lines of all processes except process 1."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if os.readlink(folder / "ns" / "pid") == self._processes and int(folder.name) != self.pid:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found += [line.strip()] if line else []  # the line of a zombie is empty
        return found

    def kill(self) -> None:
        """End all processes of the machine at once, as a power cut does."""
        if self._unshare.poll() is None:  # else another process may have the id by now
            os.kill(self.pid, signal.SIGKILL)
        self._unshare.wait()
        until(lambda: not self.processes(), lambda: f"{self.name} has left {self.processes()}")


class Host(Machine):
    """A machine that admits root by SSH with the key of its network."""

    def __init__(self, plan: Plan, address: str) -> None:
        super().__init__(plan)
        self.address = address

    def install_environment(self) -> None:
        """Link the tests' virtual environment as ~/venv, where cluster.yaml would install the packages."""
        environment = self.path("/root/venv")
        environment.mkdir()
        for part in VENV.iterdir():
            (environment / part.name).symlink_to(part)
        (environment / "finished").touch()

    def start_ssh_server(self, public_key: str) -> None:
        """Start the SSH server, which admits the owner of the key."""
        shutil.copytree("/etc/skel", self.path("/root"), dirs_exist_ok=True)
        self.path("/root/.ssh").mkdir(mode=0o700)
        self.path("/root/.ssh/authorized_keys").write_text(public_key)
        self.path("/run/sshd").mkdir(mode=0o755)
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/host_key")
        options = {
            "ListenAddress": self.address,
            "HostKey": "/run/host_key",
            "PidFile": "/run/sshd.pid",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "UsePAM": "no",  # in containers, root has no password, and PAM refuses such an account
            "MaxStartups": "50:30:100",
            "MaxSessions": "50",
        }
        self.path("/run/sshd_config").write_text("".join(f"{k} {v}\n" for k, v in options.items()))
        self.run("/usr/sbin/sshd", "-f", "/run/sshd_config", "-E", "/run/sshd.log")  # returns when it listens


class Network(Machine):
    """A switch, and the user's machine, which can read this project's folder.

    Args:
        shared: A folder of this machine that all hosts see as /shared.
    """

    KEY = "/root/hosts.pem"
    PREFIX = "10.77.0."

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        self.hosts: list[Host] = []
        super().__init__(Plan("laptop", read_only=(*_interpreter_folders(), str(ROOT))))
        self.run("ip", "link", "add", "switch", "type", "bridge")
        self.run("ip", "address", "add", f"{self.PREFIX}254/24", "dev", "switch")
        self.run("ip", "link", "set", "switch", "up")
        self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "tests", "-f", self.KEY)

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for machine in (*self.hosts, self):
            machine.kill()
        mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if MOUNT in line]
        assert not mounts, f"the machines have left {mounts}"

    def host(self, name: str) -> Host:
        """Add a host.

        Args:
            name: Host name of at most 11 characters.
        """
        address = f"{self.PREFIX}{len(self.hosts) + 2}"
        # This project is hidden, so that hosts run the sources that were sent to them.
        hidden = {str(path) for path in (ROOT, VENV.parent) if (path / "pyproject.toml").exists()}
        plan = Plan(name, tuple(hidden), tuple(_interpreter_folders()), {"/shared": str(self.shared)})
        host = Host(plan, address)
        self.hosts.append(host)
        # Enter the user's network only: in that machine's process namespace, the host has another process id.
        for command in (
            f"link add to-{name} type veth peer name of-{name}",
            f"link set of-{name} netns {host.pid} name eth0",
            f"link set to-{name} master switch up",
        ):
            subprocess.run(["nsenter", "-t", str(self.pid), "--net", "ip", *command.split()], check=True)
        host.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        names = ["127.0.0.1 localhost", f"{self.PREFIX}254 {self.name}"]
        names += [f"{each.address} {each.name}" for each in self.hosts]
        for machine in (self, *self.hosts):
            machine.path("/etc/hosts").write_text("\n".join(names) + "\n")
        host.start_ssh_server(self.path(f"{self.KEY}.pub").read_text())
        until(lambda: self.reaches(address, 22), lambda: f"{name} cannot be reached")
        return host

    def reaches(self, address: str, port: int) -> bool:
        """Return whether a connection from the user's machine is accepted."""
        tried = self.start("timeout", "10", "bash", "-c", f"echo > /dev/tcp/{address}/{port}")
        tried.wait(code=None)
        return tried.process.returncode == 0


def _unshare() -> list[str]:
    return ["unshare", *NAMESPACES.values(), "--fork", "--kill-child", "--propagation", "private"]


def _interpreter_folders() -> set[str]:
    return {str(VENV), sys.base_prefix}
