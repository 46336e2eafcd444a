"""AWS in a box: moto's server in a lab, where each machine that runs is a host of the lab.

moto answers as AWS does and starts nothing. What is missing is done here: a new machine gets a host at its
address, with the image that these tests have, the key pair's public half, and a metadata service with its
role's keys; one that runs no longer has its host killed. moto enforces no rights: who asked for what is
recorded.
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
USER = "somebody"  # the access key of whoever types `ray up`
PORT = 5555
LOOK_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """What somebody asked of AWS."""

    key: str
    """The access key it is signed with."""
    service: str
    action: str
    parameters: dict[str, str] = field(hash=False)


@dataclass
class Running:
    """A machine that AWS runs."""

    host: Host
    metadata: Service
    role: str
    key: str
    """The access key that its metadata service gives."""


class Account:
    """From when it is made until `close`. A host's name is the end of its machine's id; `image` makes it
    what a machine of a node type of Ray's is after its boot."""

    def __init__(self, lab: Lab, image: Callable[[Host, str], None]) -> None:
        self.url = f"http://{lab.address}:{PORT}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": USER,
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        """Of whoever types `ray up`."""
        self.machines: dict[str, Running] = {}
        self.keys: dict[str, str] = {USER: "user"}
        """Role, by access key."""
        self._lab, self._image = lab, image
        self._network = lab.network()
        self._clients: dict[str, Any] = {}
        self._end, self._lock, self._trouble = threading.Event(), threading.RLock(), ""
        recording = {"MOTO_ENABLE_RECORDING": "true", "MOTO_RECORDER_FILEPATH": "/tmp/requests"}
        with lab.path("/tmp/moto.log").open("wb") as log:
            self._server = lab.start(
                "moto_server", "-H", lab.address, "-p", str(PORT), output=log, **recording
            )
        self._await_server()
        self._agent = threading.Thread(target=self._follow, daemon=True)
        self._agent.start()

    def client(self, service: str) -> Any:
        """boto3's, of the user; it works from any thread."""
        if service not in self._clients:
            session = boto3.Session(aws_access_key_id=USER, aws_secret_access_key="none", region_name=REGION)
            make = self._network.submit(session.client, service, endpoint_url=self.url)
            self._clients[service] = _Client(make.result(), self._network)
        return self._clients[service]

    def instances(self, *states: str) -> list[dict[str, Any]]:
        """All that were ever started, or those in one of these states."""
        answer = self.client("ec2").describe_instances()["Reservations"]
        found = [instance for reservation in answer for instance in reservation["Instances"]]
        return [i for i in found if not states or i["State"]["Name"] in states]

    def of_type(self, name: str) -> dict[str, Running]:
        """The machines of a node type of Ray's that run now and have a host."""
        self.check()
        ids = {i["InstanceId"] for i in self.instances("running") if tags(i)["ray-user-node-type"] == name}
        return {key: machine for key, machine in dict(self.machines).items() if key in ids}

    def give_notice(self, instance_id: str, seconds: float) -> None:
        """AWS will take it away."""
        self.machines[instance_id].metadata.give_notice(seconds)

    def take_away(self, instance_id: str) -> None:
        """With a notice before or without: its host is dead when this comes back."""
        with self._lock:
            self._kill(instance_id)
            self.client("ec2").terminate_instances(InstanceIds=[instance_id])

    def requests(self) -> list[Request]:
        """All so far, in order."""
        return [_read(line) for line in self._lab.path("/tmp/requests").read_text().splitlines()]

    def check(self) -> None:
        """Raises AssertionError when a machine could not be had."""
        assert not self._trouble, self._trouble

    def close(self) -> None:
        self._end.set()
        self._agent.join()
        for machine in self.machines.values():
            machine.metadata.close()
        self._network.shutdown()
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.wait()

    def _await_server(self) -> None:
        def listens() -> bool:
            assert self._server.poll() is None, log()
            return not self._lab.run("bash", "-c", f"echo > /dev/tcp/{self._lab.address}/{PORT}", check=False)

        def log() -> str:
            return self._lab.path("/tmp/moto.log").read_text()

        until(listens, log)

    def _follow(self) -> None:
        while not self._end.wait(LOOK_SECONDS):
            try:
                with self._lock:
                    running = {i["InstanceId"]: i for i in self.instances("running")}
                    for instance_id in running.keys() - self.machines.keys():
                        self.machines[instance_id] = self._boot(running[instance_id])
                    for instance_id in self.machines.keys() - running.keys():
                        self._kill(instance_id)
            except Exception:
                self._trouble = traceback.format_exc()
                print(self._trouble, flush=True)
                # So that nobody waits for a machine that will not come.
                os.killpg(self._server.pid, signal.SIGKILL)
                return

    def _boot(self, instance: dict[str, Any]) -> Running:
        host = self._lab.host(instance["InstanceId"][-8:], instance["PrivateIpAddress"], empty=POSTGRESQL)
        role, rights = self._rights(instance)
        metadata = metadata_service(host)
        metadata.rights[role] = json.dumps(rights)
        self._image(host, tags(instance)["ray-user-node-type"])
        pair = self.client("ec2").describe_key_pairs(KeyNames=[instance["KeyName"]], IncludePublicKey=True)
        host.path("/root/.ssh/authorized_keys").write_text(pair["KeyPairs"][0]["PublicKey"].strip() + "\n")
        return Running(host, metadata, role, rights["AccessKeyId"])

    def _rights(self, instance: dict[str, Any]) -> tuple[str, dict[str, str]]:
        """Its role, and what the metadata service answers for it."""
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
    """What answers there at the address that EC2's metadata service has."""
    host.run("ip", "address", "add", f"{METADATA}/32", "dev", "lo")
    network = host.network()
    service = network.submit(Service, 80, METADATA).result()
    network.shutdown()
    return service


class _Client:
    """A client of boto3's whose requests leave from another thread."""

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
    # AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, ...
    signed = headers.get("Authorization", "").partition("Credential=")[2].partition(",")[0].split("/")
    key, service = (signed[0], signed[3]) if len(signed) == 5 else ("", "")
    parameters = {name: values[0] for name, values in urllib.parse.parse_qs(body).items()}
    action = parameters.pop("Action", "") or headers.get("X-Amz-Target", "").rpartition(".")[2]
    return Request(key, service, action or f"{entry['method']} {entry['url']}", parameters)
