"""The shipped cluster files are clean once they are filled in; each seeded mistake is found, and nothing else."""

from __future__ import annotations

import copy
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from clusterns_ray.errors import ConfigError
from clusterns_ray.launch import preemption as spot
from clusterns_ray.ops.cluster_lint import check_cluster_file
from clusterns_ray.ops.cluster_lint.common import pinned_versions
from clusterns_ray.ops.cluster_lint.launcher import START_WATCHER, _is_spot

ROOT = Path(__file__).parents[2]
FILES = {
    "aws": ROOT / "cluster.yaml",
    "gcp": ROOT / "experiments/clusters/gcp.yaml",
    "kubernetes": ROOT / "experiments/clusters/kuberay.yaml",
    "skypilot": ROOT / "experiments/clusters/skypilot.yaml",
}
TYPES = "available_node_types"
OWN = {"my-project": "sentences-4711", "s3://my-bucket": "s3://sentences-4711", "registry.example.com": "ghcr.io/acme"}
"""What a user would put in place of each placeholder."""


def filled_in(text: str) -> str:
    for placeholder, value in OWN.items():
        text = text.replace(placeholder, value)
    return text


# Through JSON, as parts that are shared by YAML's anchors would change together.
SHIPPED = {
    name: json.loads(json.dumps(list(yaml.safe_load_all(filled_in(path.read_text(encoding="utf-8"))))))
    for name, path in FILES.items()
}
PINNED = pinned_versions(FILES["aws"])
RAY = PINNED["ray"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Below the tested versions, as the shipped files are."""
    path = tmp_path_factory.mktemp("clusters")
    (path / "constraints.txt").write_text((ROOT / "constraints.txt").read_text())
    return path


PLACES: dict[str, list[tuple[str, str]]] = {
    "aws": [],
    "skypilot": [],
    "gcp": [
        ("provider.project_id", "'my-project' is a placeholder"),
        (
            f"{TYPES}.l4_spot.node_config.serviceAccounts.0.email",
            "'clusterns-worker@my-project.iam.gserviceaccount.com' holds the placeholder 'my-project'",
        ),
    ],
    "kubernetes": [
        (
            "spec.headGroupSpec.template.spec.containers.0.image",
            "'registry.example.com/clusterns-ray:0.1.0' holds the placeholder 'registry.example.com' (lines ",
        ),
        (
            "spec.entrypoint",
            "'runtime.storage_path=s3://my-bucket/clusterns' holds the placeholder 'my-bucket'",
        ),
    ],
}


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_files_name_what_is_to_be_filled_in_and_are_clean_then(name: str, directory: Path) -> None:
    found = check_cluster_file(FILES[name])
    assert [(finding.level, finding.what) for finding in found] == [("problem", place) for place, _ in PLACES[name]]
    for finding, (_, value) in zip(found, PLACES[name], strict=True):
        assert value in finding.value and finding.remedy.endswith("with your own value.")
    copied = directory / "filled-in.yaml"
    copied.write_text(filled_in(FILES[name].read_text(encoding="utf-8")), encoding="utf-8")
    assert check_cluster_file(copied) == []


@pytest.mark.parametrize(
    "value",
    [
        *("your-project-id", "YOUR_BUCKET", "<project>", "<your project id>", "{{ project }}", "CHANGE_ME", "changeme"),
        *("replace-me", "TODO", "fill in", "my_registry/image:1", "myregistry.io/image:1", "example-org/image:1"),
        *("registry.example/image:1", "image.example.org:5000/image:1", "train --to s3://BUCKET/runs", "gs://bucket"),
        *(
            "PROJECT_ID",
            "subnet-xxxxxxxx",
            "ami-0123456789abcdef0",
            "arn:aws:iam::123456789012:role/worker",
            "s3://...",
        ),
        "worker@your-project.iam.gserviceaccount.com",
    ],
)
def test_kinds_of_placeholders(directory: Path, value: str) -> None:
    config = copy.deepcopy(SHIPPED["gcp"][0])
    config["provider"]["project_id"] = value
    (found,) = findings(directory, [config])
    assert found.startswith("problem provider.project_id: ") and "placeholder" in found


@pytest.mark.parametrize(
    "value",
    [
        *("mylene-4711", "army-bucket", "my-project-38271", "examples-4711", "maximum", "sentences-4711", "todos"),
        *("sort < in > out; cat 2>&1 < /dev/null", "echo $BUCKET ${PROJECT_ID}", "BUCKET=$(cat x)", "s3://b.my-shop/x"),
        *("me@acme.com", "changes-me.io", "ami-0a1b2c3d4e5f67890", "arn:aws:iam::482910573516:role/worker", "exxon"),
    ],
)
def test_values_of_ones_own_are_no_placeholders(directory: Path, value: str) -> None:
    config = copy.deepcopy(SHIPPED["gcp"][0])
    config["provider"]["project_id"] = value
    assert findings(directory, [config]) == []


def test_comments_hold_no_placeholders(directory: Path) -> None:
    path = directory / "comment.yaml"
    path.write_text(filled_in(FILES["gcp"].read_text(encoding="utf-8")) + "# s3://my-bucket, <project>\n")
    assert check_cluster_file(path) == []


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_rays_own_schema_takes_them(name: str) -> None:
    """Not through our checker: were it to swallow what Ray says, this would not."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = prepare_config(copy.deepcopy(SHIPPED[name][0]))
    validate_config(complete)
    assert complete["available_node_types"]["l4_spot"]["priority"] == 3


def test_what_they_say_in_words_is_so() -> None:
    aws = SHIPPED["aws"][0]
    types = aws["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert "InstanceMarketOptions" not in types["head"]["node_config"]
    for config in (aws, SHIPPED["gcp"][0]):
        workers = {name: kind for name, kind in config["available_node_types"].items() if name != "head"}
        by_priority = sorted(workers, key=lambda name: -workers[name]["priority"])
        assert len(workers) == 4 and list(workers) == by_priority
        assert [_is_spot(workers[name]) for name in by_priority] == [True, True, False, False]
        for name, kind in workers.items():
            assert kind["resources"] == {"CPU": 8, "GPU": 1}, "else one could not stand in"
            assert name == "_".join(kind["labels"].values()).lower().replace("-", "_")
            assert kind["min_workers"] == 0
    for local in aws["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists(), local
    gcp = SHIPPED["gcp"][0]
    same = ("max_workers", "idle_timeout_minutes", "file_mounts", "worker_setup_commands", "head_start_ray_commands")
    assert {key: gcp[key] for key in same} == {key: aws[key] for key in same}


def test_the_two_kubernetes_documents_have_the_same_cluster() -> None:
    cluster, job = (document["spec"] for document in SHIPPED["kubernetes"])
    inner = job["rayClusterSpec"]
    assert inner == cluster
    assert cluster["rayVersion"] == RAY


COMMANDS = [
    (name, command)
    for name in ("aws", "gcp")
    for key, commands in SHIPPED[name][0].items()
    if key.endswith("_commands")
    for command in commands
]


COMMANDS += [("skypilot", SHIPPED["skypilot"][0][key]) for key in ("setup", "run")]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_is_one_for_the_shell(name: str, command: str) -> None:
    # As Ray puts it around each.
    text = f"source ~/.bashrc; export OMP_NUM_THREADS=1 && (export RAY_HEAD_IP=10.0.0.1; {command})"
    done = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_what_every_shell_knows_is_written_once(name: str, tmp_path: Path) -> None:
    (command,) = SHIPPED[name][0]["initialization_commands"]
    (tmp_path / ".bashrc").write_text("# before\n")
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env={"HOME": str(tmp_path)}, check=True, timeout=20)
    asked = 'source ~/.bashrc; echo "$RAY_AUTH_MODE $CLUSTERNS_LOCAL_PATH $PATH"'
    env = {"HOME": str(tmp_path), "PATH": "/bin"}
    said = subprocess.run(["/bin/bash", "-c", asked], env=env, check=True, capture_output=True, text=True, timeout=20)
    mode, local, path = said.stdout.split()
    assert (mode, path) == ("token", f"{tmp_path}/venv/bin:{tmp_path}/.local/bin:/bin")
    assert local == {"aws": "/opt/dlami/nvme/clusterns", "gcp": f"{tmp_path}/clusterns-local"}[name]
    assert len((tmp_path / ".bashrc").read_text().splitlines()) == 4


def test_the_watcher_understands_its_options() -> None:
    for name in ("aws", "gcp"):
        command = SHIPPED[name][0]["worker_start_ray_commands"][2]
        assert command.replace(f" --provider {name}", "") == START_WATCHER, "what the remedy says is what is shipped"
        words = command.split()
        options = words[words.index("clusterns_ray.launch.preemption") + 1 : words.index(">>")]
        assert spot.parse(options).provider == name
    for group in SHIPPED["kubernetes"][0]["spec"]["workerGroupSpecs"]:
        hook = group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[:3] == ["python", "-m", "clusterns_ray.launch.preemption"]
        assert spot.parse(hook[3:]).drain_now == 100


def test_the_image_holds_what_the_machines_of_ray_up_get() -> None:
    lines = (ROOT / "experiments/clusters/Dockerfile").read_text(encoding="utf-8").splitlines()
    commands = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert [command for command, _ in commands] == ["FROM", "COPY", "RUN", "WORKDIR"]
    assert commands[0][1] == f"rayproject/ray:{RAY}-py311-gpu"
    assert commands[2][1].endswith('-c constraints.txt ".[gpu]"')
    context = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert context[1] == "*", "everything is left out but what is named"
    kept = {line[1:] for line in context if line.startswith("!")}
    assert kept == {local for local in SHIPPED["aws"][0]["file_mounts"].values() if not local.startswith("~")}


# ---- seeded mistakes ------------------------------------------------------------------------------------------------

Change = Callable[[Any], object]


def put(path: str, value: Any) -> Change:
    """Set what ``a b 0 c`` names."""

    def change(config: Any) -> None:
        *before, last = path.split()
        for part in before:
            config = config[int(part) if isinstance(config, list) else part]
        config[int(last) if isinstance(config, list) else last] = value

    return change


def drop(path: str) -> Change:
    def change(config: Any) -> None:
        *before, last = path.split()
        for part in before:
            config = config[int(part) if isinstance(config, list) else part]
        del config[int(last) if isinstance(config, list) else last]

    return change


def rewrite(key: str, old: str, new: str) -> Change:
    """In all the commands of a list."""

    def change(config: Any) -> None:
        before = config[key]
        config[key] = [command.replace(old, new) for command in before]
        assert config[key] != before, f"{old!r} is not in {key}"

    return change


def several(*changes: Change) -> Change:
    return lambda config: [change(config) for change in changes]


LAUNCHER: dict[str, tuple[Change, str, str]] = {
    "a zone of another region": (
        put("provider availability_zone", "us-west-2a, us-east-1b"),
        "problem provider.availability_zone",
        "is us-east-1b, which is not in provider.region, us-west-2",
    ),
    "negative min": (put(f"{TYPES} l4_spot min_workers", -1), "problem l4_spot", "is -1"),
    "negative max": (put(f"{TYPES} l4_spot max_workers", -2), "problem l4_spot", "max_workers -2"),
    "min above max": (put(f"{TYPES} l4_on_demand min_workers", 3), "problem l4_on_demand", "min_workers is 3"),
    "machines that always run": (put(f"{TYPES} l4_spot min_workers", 2), "warning l4_spot.min_workers", "cost"),
    "no cap": (drop("max_workers"), "warning max_workers", "not given"),
    "head as a worker": (put(f"{TYPES} head max_workers", 2), "problem head.max_workers", "as workers too"),
    "no idle time-out": (drop("idle_timeout_minutes"), "problem idle_timeout_minutes", "not given"),
    "hours of idling": (put("idle_timeout_minutes", 240), "warning idle_timeout_minutes", "240 minutes"),
    "another ray": (
        rewrite("worker_setup_commands", '".[gpu]"', '".[gpu]" ray==2.9.0'),
        "problem setup_commands",
        f"ray==2.9.0, but constraints.txt has ray=={RAY}",
    ),
    "another torch, with an extra": (
        put("setup_commands 0", "pip install -c constraints.txt Torch[opt]==2.5.1"),
        "problem setup_commands",
        "torch==2.5.1",
    ),
    "no constraints": (
        rewrite("worker_setup_commands", "-c constraints.txt ", ""),
        "problem setup_commands",
        "installs without constraints.txt",
    ),
    "an image with another ray": (
        put("docker", {"image": "rayproject/ray:2.44.1-py311-gpu", "container_name": "ray"}),
        "problem docker.image",
        "2.44.1",
    ),
    "auth off": (
        several(*(rewrite(f"{who}_start_ray_commands", "=token", "=disabled") for who in ("head", "worker"))),
        "problem head_start_ray_commands",
        "RAY_AUTH_MODE is disabled, token",
    ),
    "auth unset": (
        several(
            drop("initialization_commands"),
            *(rewrite(f"{who}_start_ray_commands", "export RAY_AUTH_MODE=token;", "") for who in ("head", "worker")),
        ),
        "problem worker_start_ray_commands",
        "not set",
    ),
    "no token file": (drop("file_mounts /home/ubuntu/.ray/auth_token"), "problem file_mounts", "token file"),
    "no watcher": (drop("worker_start_ray_commands 2"), "problem worker_start_ray_commands", "nothing watches"),
    "a watcher that blocks": (
        put("worker_start_ray_commands 2", "python -m clusterns_ray.launch.preemption"),
        "problem worker_start_ray_commands",
        "never end",
    ),
    "an unknown key": (put("max_worker", 3), "problem schema", "max_worker"),
    "no such head type": (put("head_node_type", "hed"), "problem schema", "head_node_type"),
    "a word for a number": (put("idle_timeout_minutes", "five"), "problem schema", "'five'"),
}


def findings(directory: Path, documents: list[Any]) -> list[str]:
    path = directory / "mutated.yaml"
    path.write_text(yaml.safe_dump_all(documents))
    return [f"{found.level} {found.what}: {found.value}" for found in check_cluster_file(path)]


ALSO = {
    # Where one mistake is two, by the nature of it.
    "auth off": {"problem worker_start_ray_commands"},
    "auth unset": {"problem head_start_ray_commands"},
    "a word for a number": {"problem idle_timeout_minutes"},
    "no such head type": {"problem head.max_workers", "warning"},
}


@pytest.mark.parametrize("mistake", LAUNCHER)
def test_a_mistake_in_a_launcher_file_is_found(directory: Path, mistake: str) -> None:
    change, where, words = LAUNCHER[mistake]
    config = copy.deepcopy(SHIPPED["aws"][0])
    change(config)
    found = findings(directory, [config])
    assert any(line.startswith(where) and words in line for line in found), found
    expected = {where, *ALSO.get(mistake, set())}
    assert [line for line in found if not line.startswith(tuple(expected))] == []


SKYPILOT: dict[str, tuple[Change, str]] = {
    "no token": (drop("secrets RAY_AUTH_TOKEN"), "problem secrets"),
    "another mode": (put("envs RAY_AUTH_MODE", "disabled"), "problem secrets"),
    "any version": (put("setup", "pip install '.[gpu]'"), "problem setup"),
    "ends SkyPilot's Ray": (put("run", "clusterns tune x --set runtime.storage_path=y\nray stop"), "problem run"),
    "results stay there": (put("run", "clusterns tune x"), "problem run"),
    "no GPU": (put("resources", {"cpus": "8+"}), "problem resources"),
}


@pytest.mark.parametrize("mistake", SKYPILOT)
def test_a_mistake_in_a_task_of_skypilot_is_found(directory: Path, mistake: str) -> None:
    change, where = SKYPILOT[mistake]
    task = copy.deepcopy(SHIPPED["skypilot"][0])
    change(task)
    (found,) = findings(directory, [task])
    assert found.startswith(where)


def test_mistakes_of_google_cloud_are_found(directory: Path) -> None:
    config = copy.deepcopy(SHIPPED["gcp"][0])
    del config["worker_start_ray_commands"][2]
    found = findings(directory, [config])
    assert [re.sub(":.*", "", line) for line in found] == ["problem worker_start_ray_commands"]
    assert "(l4_spot, a100_spot)" in found[0] or "(a100_spot, l4_spot)" in found[0]

    config = copy.deepcopy(SHIPPED["gcp"][0])
    config["provider"]["availability_zone"] = "us-central1-b"  # the disks are forgotten
    found = findings(directory, [config])
    assert len(found) >= 2 and all("names zone us-central1-a, and provider.availability_zone is" in it for it in found)


GROUP = "spec workerGroupSpecs 0"
POD = f"{GROUP} template spec"
CONTAINER = f"{POD} containers 0"

KUBERNETES: dict[str, tuple[int, Change, str, str]] = {
    "negative count": (
        0,
        put(f"{GROUP} minReplicas", -1),
        "problem RayCluster/clusterns.gpu-spot",
        "minReplicas -1",
    ),
    "no cap": (0, drop(f"{GROUP} maxReplicas"), "problem RayCluster/clusterns.gpu-spot", "maxReplicas None"),
    "min above max": (0, put(f"{GROUP} minReplicas", 9), "problem RayCluster/clusterns.gpu-spot", "minReplicas 9"),
    "no idle time-out": (
        0,
        drop("spec autoscalerOptions idleTimeoutSeconds"),
        "problem RayCluster/clusterns.autoscalerOptions.idleTimeoutSeconds",
        "is None",
    ),
    "no autoscaling": (
        0,
        put("spec enableInTreeAutoscaling", False),
        "problem RayCluster/clusterns.enableInTreeAutoscaling",
        "is False",
    ),
    "the old autoscaler": (
        0,
        put("spec autoscalerOptions version", "v1"),
        "problem RayCluster/clusterns.autoscalerOptions.version",
        "'v1'",
    ),
    "another ray": (0, put("spec rayVersion", "2.9.0"), "problem RayCluster/clusterns.rayVersion", RAY),
    "auth off": (0, put("spec authOptions mode", "disabled"), "problem RayCluster/clusterns.authOptions", "'disabled'"),
    "no token": (0, drop("spec authOptions secretName"), "problem RayCluster/clusterns.authOptions", "None"),
    "no drain": (
        0,
        drop(f"{CONTAINER} lifecycle"),
        "problem RayCluster/clusterns.gpu-spot.lifecycle.preStop",
        "drains",
    ),
    "too little grace": (
        0,
        put(f"{POD} terminationGracePeriodSeconds", 60),
        "problem RayCluster/clusterns.gpu-spot.terminationGracePeriodSeconds",
        "is 60",
    ),
    "default grace": (
        0,
        drop(f"{POD} terminationGracePeriodSeconds"),
        "problem RayCluster/clusterns.gpu-spot.terminationGracePeriodSeconds",
        "is 30",
    ),
    "images that differ": (
        0,
        put(f"{CONTAINER} image", "ghcr.io/acme/clusterns-ray:0.2.0"),
        "problem RayCluster/clusterns",
        "different images",
    ),
    "a cluster that stays": (
        1,
        drop("spec shutdownAfterJobFinishes"),
        "problem RayJob/clusterns-sweep.shutdownAfterJobFinishes",
        "would stay",
    ),
    "a job's cluster": (
        1,
        put("spec rayClusterSpec authOptions mode", "disabled"),
        "problem RayJob/clusterns-sweep.rayClusterSpec.authOptions",
        "'disabled'",
    ),
    "no workers": (0, put("spec workerGroupSpecs", []), "problem RayCluster/clusterns.workerGroupSpecs", "none"),
}


@pytest.mark.parametrize("mistake", KUBERNETES)
def test_a_mistake_in_kubernetes_documents_is_found(directory: Path, mistake: str) -> None:
    number, change, where, words = KUBERNETES[mistake]
    documents = copy.deepcopy(SHIPPED["kubernetes"])
    change(documents[number])
    found = findings(directory, documents)
    assert any(line.startswith(where) and words in line for line in found), found
    assert [line for line in found if not line.startswith(where)] == []


def test_what_is_beside_the_documents(directory: Path) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "clusterns"}}
    assert findings(directory, [account, *SHIPPED["kubernetes"]]) == []
    assert findings(directory, [account]) == ["problem kind: there is no RayCluster and no RayJob"]


def test_a_job_on_a_cluster_that_is_there(directory: Path) -> None:
    job = copy.deepcopy(SHIPPED["kubernetes"][1])
    job["spec"] = {"entrypoint": "clusterns train x.yaml", "clusterSelector": {"ray.io/cluster": "clusterns"}}
    assert findings(directory, [job]) == []


@pytest.mark.parametrize("image", ["rayproject/ray", "clusterns-ray:latest", "host:5000/clusterns-ray"])
def test_images_that_may_change(directory: Path, image: str) -> None:
    documents = [copy.deepcopy(SHIPPED["kubernetes"][0])]
    spec = documents[0]["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        group["template"]["spec"]["containers"][0]["image"] = image
    found = findings(directory, documents)
    assert len(found) == 3 and all("names no version" in line for line in found), found


def test_versions_without_constraints_are_those_installed_here(tmp_path: Path) -> None:
    from importlib.metadata import version

    config = copy.deepcopy(SHIPPED["aws"][0])
    config["worker_setup_commands"] = [f'pip install -c constraints.txt ".[gpu]" ray=={version("ray")} pyyaml==0.1']
    assert findings(tmp_path, [config]) == [
        f"problem setup_commands: pyyaml==0.1, but constraints.txt has pyyaml=={version('pyyaml')}"
    ]


# ---- files that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "is not YAML"),
        ("", "neither one for `ray up`"),
        ("- 1\n", "neither"),
        ("encoder: {name: x}\n", "neither"),
        ("kind: RayCluster\n---\nprovider: {}\n", "neither"),
        ("\x00", "is not YAML"),
    ],
)
def test_not_a_cluster_file(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(words)):
        check_cluster_file(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing.yaml' cannot be read: No such file"):
        check_cluster_file(tmp_path / "missing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        check_cluster_file(tmp_path / "bytes.yaml")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *(("aws", key) for key in (*SHIPPED["aws"][0], "available_node_types head", "provider type")),
        *(("kubernetes", f"spec {key}") for key in SHIPPED["kubernetes"][0]["spec"]),
        *(("kubernetes", f"spec {key}") for key in ("headGroupSpec template", "workerGroupSpecs 0")),
    ],
)
def test_nothing_that_is_written_there_makes_it_fail(directory: Path, kind: str, key: str) -> None:
    for value in (None, 7, "text", [], ["x", 7], {"x": None}):
        document = copy.deepcopy(SHIPPED[kind][0])
        put(key, value)(document)
        findings(directory, [document])
