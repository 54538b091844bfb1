"""A machine of its own, with its own kernel: what containers share with their host can be seen there as it is elsewhere.

QEMU emulates the processor, so it needs nothing of the host; Python is some ten times slower in there. What is switched
off below costs an emulation a quarter of its time.
"""

import contextlib
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.seed import await_true
from tests.nspawn.booted import CLEAN, UP, Booted
from tests.nspawn.root import Debian, machine_root, run

KERNEL = ("linux-image-cloud-amd64", "initramfs-tools", "udev", "openssh-server", "libpam-systemd", "dbus-user-session")
DEBIANS = (Debian("vm-13", "trixie", "3.13", KERNEL), Debian("vm-12", "bookworm", "3.11", KERNEL))
BOOTED_WITHIN_S = 180.0
PROCESSOR = "max,la57=off,svm=off,smap=off,smep=off,pku=off"
MEMORY_MIB = 2048
DISK_BYTES = 4 << 30
HOST = "127.0.0.1"
# There is one disk and one network card, whose drivers the kernel's own start has loaded, and nobody at a terminal.
UNUSED = (
    *("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
    *("systemd-udev-trigger.service", "kmod-static-nodes.service", "systemd-modules-load.service"),
    *("systemd-random-seed.service", "systemd-timesyncd.service", "getty@tty1.service", "serial-getty@ttyS0.service"),
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_reap.service"),
)
NETWORK = "[Match]\nType=ether\n[Network]\nAddress=10.0.2.15/24\n"  # QEMU's own: it leads to nobody but us


@dataclass(frozen=True)
class VirtualMachine(Booted):
    """Reached through ssh, on a port of ours that leads to it. `directory` holds the key.

    `forwards`: the ports of ours that lead to ports of its loopback.
    """

    directory: Path
    port: int
    forwards: Mapping[int, int]

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def argv(self, *command: str) -> tuple[str, ...]:
        return (*self.ssh(), f"root@{HOST}", shlex.join((*CLEAN, *command)))

    def ssh(self) -> tuple[str, ...]:
        """Commands share one connection: a handshake takes a second there."""
        options = {
            "IdentityFile": self.directory / "key",
            "ControlPath": self.directory / "ssh",
            "ControlMaster": "auto",
            "ControlPersist": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "BatchMode": "yes",
            "ConnectTimeout": "5",
        }
        words = (word for name, value in options.items() for word in ("-o", f"{name}={value}"))
        return ("ssh", "-F", "none", *words, "-p", str(self.port))


def make_disk(root: Path, directory: Path) -> Path:
    """A disk with what is in `root`, where only the key that is made in `directory` opens the door."""
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / "key"))
    keys = root / "root/.ssh/authorized_keys"
    keys.parent.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(directory / "key.pub", keys)
    (root / "etc/systemd/network/80-qemu.network").write_text(NETWORK)
    (root / "etc/ssh/sshd_config.d/plain.conf").write_text("UsePAM no\n")  # no session of systemd's for each command
    (root / "etc/fstab").write_text("")
    run("chroot", str(root), *CLEAN, "systemctl", "--quiet", "enable", "systemd-networkd", "ssh")
    run("chroot", str(root), *CLEAN, "systemctl", "--quiet", "mask", *UNUSED)
    disk = directory / "disk"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    run("mkfs.ext4", "-q", "-d", str(root), str(disk))
    return disk


@contextlib.contextmanager
def booted(
    root: Path, directory: Path, free_port: Callable[[], int], forwards: Sequence[int] = ()
) -> Iterator[VirtualMachine]:
    """Boot it from a copy of `root`, and yield it once it is up. It is gone afterwards."""
    disk, console = make_disk(root, directory), directory / "console"
    machine = VirtualMachine(directory, free_port(), {free_port(): port for port in forwards})
    (kernel,), (initrd,) = (tuple((root / "boot").glob(f"{name}-*")) for name in ("vmlinuz", "initrd.img"))
    command = (
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", PROCESSOR),
        *("-m", str(MEMORY_MIB), "-nodefaults", "-display", "none", "-no-reboot", "-serial", f"file:{console}"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", "root=/dev/vda rw console=ttyS0 mitigations=off"),
        *("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"),
        *("-nic", f"user,model=virtio,restrict=on,hostfwd=tcp:{HOST}:{machine.port}-:22"),
    )
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as process:
        try:
            await_true(lambda: _is_up(process, machine), BOOTED_WITHIN_S, lambda: f"it is up\n{_end_of(console)}")
            for ours, its in machine.forwards.items():
                run(*machine.ssh(), "-O", "forward", "-L", f"{HOST}:{ours}:{HOST}:{its}", HOST)
            yield machine
        finally:
            subprocess.run((*machine.ssh(), "-O", "exit", HOST), capture_output=True, check=False)
            process.kill()


def _is_up(process: "subprocess.Popen[bytes]", machine: VirtualMachine) -> bool:
    assert process.poll() is None, f"QEMU has ended: {process.returncode}"
    return machine.run("systemctl", "is-system-running").stdout.strip() in UP


def _end_of(console: Path) -> str:
    return console.read_text(errors="replace")[-3000:] if console.exists() else ""


if __name__ == "__main__":
    for debian in DEBIANS:
        machine_root(debian)
