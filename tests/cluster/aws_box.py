"""A simulated AWS: moto's server in a lab, with a host of the lab for each running machine.

moto answers like AWS but starts no machines. This module adds them: for each new machine it creates a host at
the machine's address, with the public key of the machine's key pair and a metadata service that returns the
keys of its role. When a machine ends, its host is killed. moto enforces no rights, so all requests are
recorded for the tests to check.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import traceback
import urllib.parse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import boto3
from events import until
from imds_server import Service
from lab import POSTGRESQL, Host, Lab

REGION = "us-west-2"
METADATA = "169.254.169.254"
USER = "somebody"  # the access key of the user who runs `ray up`
PORT = 5555
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """A request to AWS."""

    key: str
    """The access key with which it is signed."""
    service: str
    action: str
    parameters: dict[str, str] = field(hash=False)


@dataclass
class RunningMachine:
    """A running machine."""

    host: Host
    metadata: Service
    role: str
    key: str
    """The access key that its metadata service returns."""


class Account:
    """An AWS account, which exists until `close`. A host's name is the end of its machine's id.

    Args:
        lab: The lab that gets the hosts.
        image: Prepares a host like a newly booted machine of a node type in cluster.yaml, given by name.
    """

    def __init__(self, lab: Lab, image: Callable[[Host, str], None]) -> None:
        self.url = f"http://{lab.address}:{PORT}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        """The environment of the user who runs `ray up`."""
        self.machines: dict[str, RunningMachine] = {}
        self.keys: dict[str, str] = {USER: "user"}
        """Instance profile (or `user`) of each access key."""
        self._lab, self._image = lab, image
        self._network = lab.network()
        self._clients: dict[str, Any] = {}
        self._closing, self._lock, self._error = threading.Event(), threading.RLock(), ""
        recording = {"MOTO_ENABLE_RECORDING": "true", "MOTO_RECORDER_FILEPATH": "/tmp/requests"}
        with lab.path("/tmp/moto.log").open("wb") as log:
            self._server = lab.start(
                "moto_server", "-H", lab.address, "-p", str(PORT), output=log, **recording
            )
        self._wait_for_server()
        self._agent = threading.Thread(target=self._update_hosts, daemon=True)
        self._agent.start()

    def client(self, service: str) -> Any:
        """Return the user's boto3 client of a service, usable from any thread."""
        if service not in self._clients:
            session = boto3.Session(aws_access_key_id=USER, aws_secret_access_key="none", region_name=REGION)
            make = self._network.submit(session.client, service, endpoint_url=self.url)
            self._clients[service] = _Client(make.result(), self._network)
        return self._clients[service]

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """Return all machines that were ever started, or those in one of these states."""
        answer = self.client("ec2").describe_instances()["Reservations"]
        found = [instance for reservation in answer for instance in reservation["Instances"]]
        return [i for i in found if not states or i["State"]["Name"] in states]

    def of_type(self, name: str) -> dict[str, RunningMachine]:
        """Return the running machines of a node type in cluster.yaml, by instance id."""
        self.check()
        ids = {i["InstanceId"] for i in self.instances("running") if tags(i)["ray-user-node-type"] == name}
        return {key: machine for key, machine in dict(self.machines).items() if key in ids}

    def give_notice(self, instance_id: str, seconds: float) -> None:
        """Announce that AWS will take the spot machine back."""
        self.machines[instance_id].metadata.give_notice(seconds)

    def take_away(self, instance_id: str) -> None:
        """Terminate a machine, and kill its host before returning."""
        with self._lock:
            self._kill(instance_id)
            self.client("ec2").terminate_instances(InstanceIds=[instance_id])

    def requests(self) -> list[Request]:
        """Return all requests so far, in order."""
        return [_read(line) for line in self._lab.path("/tmp/requests").read_text().splitlines()]

    def check(self) -> None:
        """Raise AssertionError if a machine could not be started."""
        assert not self._error, self._error

    def close(self) -> None:
        self._closing.set()
        self._agent.join()
        for machine in self.machines.values():
            machine.metadata.close()
        self._network.shutdown()
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def _wait_for_server(self) -> None:
        def is_listening() -> bool:
            assert self._server.poll() is None, log()
            return not self._lab.run("bash", "-c", f"echo > /dev/tcp/{self._lab.address}/{PORT}", check=False)

        def log() -> str:
            return self._lab.path("/tmp/moto.log").read_text()

        until(is_listening, log)

    def _update_hosts(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                with self._lock:
                    running = {i["InstanceId"]: i for i in self.instances("running")}
                    for instance_id in running.keys() - self.machines.keys():
                        self.machines[instance_id] = self._boot(running[instance_id])
                    for instance_id in self.machines.keys() - running.keys():
                        self._kill(instance_id)
            except Exception:
                self._error = traceback.format_exc()
                print(self._error, flush=True)
                # End the server, so that no test waits for a machine that cannot start.
                os.killpg(self._server.pid, signal.SIGKILL)
                return

    def _boot(self, instance: dict[str, Any]) -> RunningMachine:
        host = self._lab.host(instance["InstanceId"][-8:], instance["PrivateIpAddress"], empty=POSTGRESQL)
        role, rights = self._rights(instance)
        metadata = metadata_service(host)
        metadata.rights[role] = json.dumps(rights)
        self._image(host, tags(instance)["ray-user-node-type"])
        pair = self.client("ec2").describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)
        host.path("/root/.ssh/authorized_keys").write_text(pair["KeyPairs"][0]["PublicKey"].strip() + "\n")
        return RunningMachine(host, metadata, role, rights["AccessKeyId"])

    def _rights(self, instance: dict[str, Any]) -> tuple[str, dict[str, str]]:
        """Return the machine's role, and the keys that its metadata service returns."""
        name = instance["IamInstanceProfile"]["Arn"].rpartition("/")[2]
        profile = self.client("iam").get_instance_profile(InstanceProfileName=name)["InstanceProfile"]
        (role,) = profile["Roles"]
        given = self.client("sts").assume_role(RoleArn=role["Arn"], RoleSessionName=instance["InstanceId"])
        keys = given["Credentials"]
        self.keys[keys["AccessKeyId"]] = name
        rights = {"Code": "Success", "Type": "AWS-HMAC", "Token": keys["SessionToken"]}
        rights |= {part: keys[part] for part in ("AccessKeyId", "SecretAccessKey")}
        return role["RoleName"], rights | {"Expiration": f"{keys['Expiration']:%Y-%m-%dT%H:%M:%SZ}"}

    def _kill(self, instance_id: str) -> None:
        machine = self.machines.pop(instance_id, None)
        if machine is not None:
            self._lab.kill_host(machine.host)
            machine.metadata.close()


def metadata_service(host: Host) -> Service:
    """Start a metadata service on the host, at the address that EC2 uses."""
    host.run("ip", "address", "add", f"{METADATA}/32", "dev", "lo")
    network = host.network()
    service = network.submit(Service, 80, METADATA).result()
    network.shutdown()
    return service


class _Client:
    """A boto3 client that sends its requests from a thread in the lab's network."""

    def __init__(self, client: Any, thread: ThreadPoolExecutor) -> None:
        self._client, self._thread = client, thread

    def __getattr__(self, name: str) -> Any:
        return lambda **parameters: self._thread.submit(getattr(self._client, name), **parameters).result()


def tags(instance: dict[str, Any]) -> dict[str, str]:
    return {tag["Key"]: tag["Value"] for tag in instance.get("Tags", ())}


def _read(line: str) -> Request:
    entry = json.loads(line)
    headers, body = entry["headers"], entry["body"] or ""
    if entry["body_encoded"]:
        body = base64.b64decode(body).decode(errors="replace")
    # The header has the form: AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, ...
    signed = headers.get("Authorization", "").partition("Credential=")[2].partition(",")[0].split("/")
    key, service = (signed[0], signed[3]) if len(signed) == 5 else ("", "")
    parameters = {name: values[0] for name, values in urllib.parse.parse_qs(body).items()}
    action = parameters.pop("Action", "") or headers.get("X-Amz-Target", "").rpartition(".")[2]
    return Request(key, service, action or f"{entry['method']} {entry['url']}", parameters)
