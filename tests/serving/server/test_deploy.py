"""The files under deploy/: linted, and what they start is started here."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
import yaml

from mldcn import __version__
from mldcn.serving.bundle import FORMAT
from mldcn.serving.server.http import OPEN

DEPLOY = Path(__file__).parents[3] / "deploy"
RUNTIME = yaml.safe_load((DEPLOY / "kserve" / "servingruntime.yaml").read_text())
SERVICE = yaml.safe_load((DEPLOY / "kserve" / "inferenceservice.yaml").read_text())
CONTAINER = RUNTIME["spec"]["containers"][0]
YAML_RULES = "{extends: default, rules: {line-length: {max: 110}}}"


def instructions():
    """The instructions of the Dockerfile's last stage, by name."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    last = max(i for i, line in enumerate(lines) if line.startswith("FROM"))
    return {name: words for name, _, words in (line.partition(" ") for line in lines[last:])}


def docker_command():
    found = instructions()
    return json.loads(found["ENTRYPOINT"]) + json.loads(found["CMD"])


def kserve_command():
    return CONTAINER["command"] + [
        each.replace("{{.Name}}", SERVICE["metadata"]["name"]) for each in CONTAINER["args"]
    ]


def run_lint(program, *words):
    path = Path(sys.executable).with_name(program)
    found = str(path) if path.exists() else shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed (mldcn[dev]): {words[-1]} is not linted")
    done = subprocess.run([found, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_dockerfile_is_clean():
    run_lint("hadolint", DEPLOY / "Dockerfile")


def test_the_yaml_is_clean():
    run_lint("yamllint", "--strict", "-d", YAML_RULES, DEPLOY / "kserve")


def test_the_container_fits_kubernetes_schema():
    """KServe's own schema is not to be had as a package; its pod's is Kubernetes'."""
    validate = pytest.importorskip(
        "kubernetes_validate",
        reason="kubernetes-validate is not installed (mldcn[dev]): no schema is checked",
    )
    spec = {
        "containers": RUNTIME["spec"]["containers"],
        "volumes": RUNTIME["spec"]["volumes"],
        "terminationGracePeriodSeconds": SERVICE["spec"]["predictor"]["terminationGracePeriodSeconds"],
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ads"}, "spec": spec}
    validate.validate(pod, validate.latest_version(), strict=True)
    with pytest.raises(validate.ValidationError):
        validate.validate(pod | {"spec": spec | {"containes": []}}, validate.latest_version(), strict=True)


def test_nobody_runs_as_root_or_writes():
    user = instructions()["USER"].split(":")[0]
    assert int(user) > 0
    security = CONTAINER["securityContext"]
    assert security["runAsNonRoot"]
    assert security["runAsUser"] == int(user)
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
    assert security["capabilities"] == {"drop": ["ALL"]}


def test_probes_and_names_go_together():
    words = dict(zip(CONTAINER["args"], CONTAINER["args"][1:], strict=False))
    port = int(words["--port"])
    for name, path in (("startup", OPEN[1]), ("readiness", OPEN[1]), ("liveness", OPEN[0])):
        assert CONTAINER[f"{name}Probe"]["httpGet"] == {"path": path, "port": port}
    assert CONTAINER["ports"][0]["containerPort"] == port
    assert OPEN[1] in instructions()["HEALTHCHECK"]
    assert CONTAINER["image"] == f"mldcn:{__version__}"
    predictor = SERVICE["spec"]["predictor"]
    formats = [(each["name"], each["version"]) for each in RUNTIME["spec"]["supportedModelFormats"]]
    asked = predictor["model"]["modelFormat"]
    assert (asked["name"], asked["version"]) in formats
    assert asked["version"] == str(FORMAT)  # of the bundles that this version writes and reads
    assert predictor["model"]["runtime"] == RUNTIME["metadata"]["name"]
    assert predictor["model"]["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
    delay = float(words["--shutdown-delay"])
    assert predictor["terminationGracePeriodSeconds"] > delay + 30  # the server's own patience with requests
    extras = re.search(r"\.\[([\w,]+)\]", (DEPLOY / "Dockerfile").read_text())[1].split(",")
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    assert set(extras) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(("made", "name"), [(docker_command, "models"), (kserve_command, "ads")])
def test_the_entry_point_serves(made, name, served_run, tmp_path):
    """Exactly the containers' command, the model where it says; only the ports and their address are others."""
    model = tmp_path / "mnt" / "models"
    shutil.copytree(served_run, model)
    command = [each.replace("/mnt/models", str(model)) for each in made()]
    assert command[:2] == ["mldcn", "serve"]
    command[0] = str(Path(sys.executable).with_name("mldcn"))
    command += ["--host", "127.0.0.1", "--port", "0", "--grpc-port", "0", "--shutdown-delay", "0"]
    empty = tmp_path / "empty"
    empty.mkdir()
    variables = os.environ | {"HOME": str(empty), "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=empty, env=variables)
    try:
        heard = []
        for line in process.stderr:
            heard.append(line)
            if line.startswith("ready"):
                break
        address = re.search(r"listening at (\S+),", "".join(heard))[1]
        with httpx.Client(base_url=address, timeout=20) as client:
            for path in OPEN:
                assert client.get(path).status_code == 200
            sample = client.get("/v1/sample").json()
            assert sample["model"] == name
            assert client.post("/v1/rank", json=sample).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert list(empty.iterdir()) == []


def test_the_images_health_check_tells_ready_from_not(server):
    words = json.loads(instructions()["HEALTHCHECK"].partition("CMD ")[2])
    assert words[0] == "python"
    for address, good in ((server.host, True), ("127.0.0.1:9", False)):
        script = words[2].replace("127.0.0.1:8000", address)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True)
        assert (done.returncode == 0) == good
