"""A SuperLink and SuperNodes as processes on loopback, with a certificate authority and keys of the test's own."""

from __future__ import annotations

import datetime
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
PEM = serialization.Encoding.PEM
PLAIN = serialization.NoEncryption()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Deployment:
    """One SuperLink, any number of SuperNodes; everything that was started ends with :meth:`close`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._certificates()
        home = self._home("cli")
        home.mkdir(parents=True)
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder}/ca.pem"\n'
        )

    def _home(self, name: str) -> Path:
        return self.folder / f"home-{name}"

    def _environment(self, name: str) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "FLWR_HOME": str(self._home(name)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }

    def start(self, name: str, *command: object) -> subprocess.Popen[bytes]:
        self._home(name).mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / str(command[0])), *map(str, command[1:])],
                env=self._environment(name), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def superlink(self) -> None:
        f = self.folder
        self.start(
            "superlink", "flower-superlink", "--host", "127.0.0.1", "--port", self.port, "--ssl-certfile", f / "server.pem",
            "--ssl-keyfile", f / "server.key", "--ssl-ca-certfile", f / "ca.pem", "--database", f / "superlink.db",
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self.wait_until(self._listens, 300, "the SuperLink's start")

    def wait_until(self, true: Callable[[], object], seconds: float, what: str) -> None:
        """Wait, for long: a slow machine is no failure. What the processes said is in the error."""
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                said = "".join(
                    f"\n--- {path.name}\n{path.read_text(errors='replace')[-2000:]}" for path in self._logs()
                )
                raise TimeoutError(f"{what} did not happen within {seconds:.0f} s{said}")
            time.sleep(0.3)

    def _logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def supernode(self, name: str, node_config: str, key: Path | None, tls: bool = True) -> None:
        security = ["--root-certificates", self.folder / "ca.pem"] if tls else ["--insecure"]
        if key is not None:
            security += ["--auth-supernode-private-key", key]
        self.start(
            name, "flower-supernode", "--superlink", f"127.0.0.1:{self.port}", *security, "--node-config", node_config,
            "--host", "127.0.0.1", "--port", free_port(),
        )  # fmt: skip

    def key(self, name: str) -> Path:
        path, key = self.folder / f"{name}.key", ec.generate_private_key(ec.SECP384R1())
        path.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.OpenSSH, PLAIN))
        path.chmod(0o600)
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        path.with_suffix(".pub").write_bytes(public)
        return path

    def flwr(self, *arguments: object) -> str:
        """Run Flower's command line; return what it printed."""
        done = subprocess.run(
            [str(BIN / "flwr"), *map(str, arguments)],
            env=self._environment("cli"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def kill(self, name: str) -> None:
        """Kill a process and all that it has started, at once."""
        process = self.processes.pop(name)
        mark = f"FLWR_HOME={self._home(name)}".encode()  # inherited by all of them, also by those that were detached
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def _certificates(self) -> None:
        authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
        (self.folder / "ca.pem").write_bytes(_certificate("authority", authority, authority, ()).public_bytes(PEM))
        names = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))
        (self.folder / "server.pem").write_bytes(_certificate("localhost", server, authority, names).public_bytes(PEM))
        (self.folder / "server.key").write_bytes(server.private_bytes(PEM, serialization.PrivateFormat.PKCS8, PLAIN))


def _certificate(name: str, key, authority, names) -> x509.Certificate:
    def called(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(called(name))
        .issuer_name(called("authority"))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=not names, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    else:
        usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    return builder.sign(authority, hashes.SHA256())
