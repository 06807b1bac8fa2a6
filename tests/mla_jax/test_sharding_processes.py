"""Two processes on one machine, each with two CPU devices, make the tokens of one device."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

ARGUMENTS = ("--json", "--ignore-eos", "--max-new-tokens", "20", "--prompt", "The", "--prompt", "A")


def start(*arguments: str, devices: int = 2) -> subprocess.Popen[str]:
    code = f"""
import jax
jax.config.update("jax_num_cpu_devices", {devices})
from mla_jax.cli.main import main
raise SystemExit(main())
"""
    return subprocess.Popen(
        [sys.executable, "-c", code, "generate", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(*arguments: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [start(*arguments, "--distributed", address, index, "2") for index in ("0", "1")]


def document(out: str) -> dict:
    """The JSON among whatever the backend of the collectives has to say."""
    (line,) = (line for line in out.splitlines() if line.startswith("{"))
    return json.loads(line)


@pytest.mark.parametrize("mesh", ["data=2,model=2", "model=4", "context=2,model=2"])
def test_two_processes(mesh):
    alone = start(*ARGUMENTS)
    both = start_two(*ARGUMENTS, "--mesh", mesh)
    want, _ = alone.communicate()
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert document(outputs[0][0])["sequences"] == document(want)["sequences"]
    assert "{" not in outputs[1][0]


def test_a_process_that_dies_ends_the_other():
    arguments = ("--max-new-tokens", "2000", "--ignore-eos", "--prompt", "The", "--mesh", "model=4")
    first, second = start_two(*arguments)
    assert first.stdout is not None
    # It writes as it goes: both are at work.
    while "The" not in first.stdout.readline(3):
        pass
    second.send_signal(signal.SIGKILL)
    second.communicate()
    _, err = first.communicate()
    assert first.returncode not in (0, None)
    assert err.strip()


@pytest.mark.parametrize("place", [("localhost:1",), ("localhost:1", "x", "2"), ("a:1", "2", "2")])
def test_refusals(place):
    process = start("--distributed", *place)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err.startswith("mla-jax: --distributed: got")
