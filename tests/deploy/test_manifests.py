"""What is shipped to clusters says what Ray Serve, KubeRay and docker can read, and what this repository holds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

import polymux
from polymux.cluster.config import ClusterConfig

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
IMAGES = {"llama-small": 2_624_000, "llama-large": 9_444_096, "qwen3-small": 2_953_216, "qwen3-large": 7_680_768}


def ray_service() -> dict[str, Any]:
    documents = {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "k8s" / "rayservice.yaml").read_text())}
    return dict(documents["RayService"])


def serve_configs() -> dict[str, Any]:
    return {
        "serve.yaml": yaml.safe_load((DEPLOY / "serve.yaml").read_text()),
        "rayservice.yaml": yaml.safe_load(ray_service()["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_ray_serve_accepts_the_configuration(name: str) -> None:
    schema = ServeDeploySchema.model_validate(serve_configs()[name])
    (application,) = schema.applications
    assert application.import_path == "polymux.deploy.app:build"
    assert application.name == ClusterConfig().name  # what `stop_serving` deletes
    assert [deployment.name for deployment in application.deployments] == ["front-door"]


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_the_arguments_are_a_configuration_of_ours(name: str) -> None:
    args = dict(serve_configs()[name]["applications"][0]["args"])
    assert args.pop("config") == "demo"
    ClusterConfig.from_dict(args)


def test_both_configurations_deploy_the_same_front_door() -> None:
    ours, theirs = (config["applications"] for config in serve_configs().values())
    assert ours == theirs


def test_the_ray_service_has_what_its_pods_need() -> None:
    spec = ray_service()["spec"]["rayClusterConfig"]
    assert spec["rayVersion"].startswith("2.60") and spec["authOptions"] == {"mode": "token"}
    (group,) = spec["workerGroupSpecs"]
    for pod in (spec["headGroupSpec"]["template"]["spec"], group["template"]["spec"]):
        (container,) = pod["containers"]
        assert container["image"] == f"polymux:{polymux.__version__}"
        assert {env["name"] for env in container["env"]} == {"POLYMUX_API_KEY", "POLYMUX_CLUSTER_TOKEN"}
        (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == mount["name"]]
        assert volume["emptyDir"]["medium"] == "Memory"
    worker = group["template"]["spec"]["containers"][0]
    assert worker["livenessProbe"]["httpGet"]["path"] == worker["startupProbe"]["httpGet"]["path"] == "/health"
    assert worker["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert {"containerPort": 8000, "name": "serve"} in worker["ports"]


def test_the_dockerfile_copies_what_is_there() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    sources = [word for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE) for word in line.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert len(sources) > 6
    for source in sources:
        assert (ROOT / source).exists() and source not in ignored
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.search(r"'\.\[(.*)\]'", text)[1].split(",")) <= set(packages)  # type: ignore[index]


def test_the_demo_arena_holds_the_two_largest_models_and_never_all_four() -> None:
    config = ClusterConfig.load(DEPLOY / "demo" / "demo.yaml", environ={})
    assert {model.name for model in config.models} == set(IMAGES)
    two = sum(sorted(IMAGES.values())[-2:])
    for pool in (config.pools.prefill, config.pools.decode):
        assert pool.arena_bytes is not None
        weights = pool.arena_bytes * (1 - config.engine.kv_fraction)
        assert two <= weights < two + min(IMAGES.values()) and pool.arena_bytes < sum(IMAGES.values())


def test_the_demo_images_are_as_large_as_its_comments_say() -> None:
    from polymux.actors.weights.checkpoint import Checkpoint

    comments = (DEPLOY / "demo" / "demo.yaml").read_text()
    for model, num_bytes in IMAGES.items():
        tensors = Checkpoint.open(str(DEPLOY / "demo" / "models" / model))
        floats = sum(tensors.tensor(name).numel() for name in tensors.names)
        assert num_bytes == pytest.approx(floats * 4, rel=1e-3)  # and what aligning them takes
        assert f"{num_bytes:,}" in comments
