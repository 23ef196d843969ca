"""The manifests fit the schemas of KubeRay and Kubernetes, Ray's own, and the pinned Ray.

Validated as an API server does, offline: drop nulls, apply defaults, then refuse what the schema
does not know.
"""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from packaging.requirements import Requirement

Json = dict[str, Any]
RAY_KINDS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}


@pytest.fixture(scope="module")
def schemas(root: Path) -> Path:
    """Return the folder of schemas, or skip: they are no part of the project."""
    folder = root.parent / "shared" / "k8s-schemas"
    if not folder.is_dir():
        pytest.skip("schemas are not here: ../shared/k8s-schemas is no part of the project")
    return folder


def manifests(root: Path) -> list[Json]:
    """Return every document in k8s/."""
    files = sorted((root / "k8s").glob("*.yaml"))
    return [document for file in files for document in yaml.safe_load_all(file.read_text())]


def ray_manifests(root: Path) -> list[Json]:
    """Return the KubeRay documents, of which there must be some of each kind."""
    found = [document for document in manifests(root) if document["kind"] in RAY_KINDS]
    assert {document["kind"] for document in found} == set(RAY_KINDS)
    return found


def cluster_of(document: Json) -> Json:
    """Return the cluster that a RayJob or RayService describes."""
    return document["spec"][RAY_KINDS[document["kind"]]]


def strict(schema: Json) -> Json:
    """Return an OpenAPI v3 schema of a CRD as a JSON schema that refuses unknown fields."""
    kept = {k: v for k, v in schema.items() if not k.startswith("x-") and k != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("anyOf", None)
        kept["type"] = ["integer", "string"]
    for key in ("items", "additionalProperties"):
        if isinstance(kept.get(key), dict):
            kept[key] = strict(kept[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in kept:
            # Such branches only narrow what the schema around them describes in full.
            kept[key] = [{k: v for k, v in branch.items() if k != "format"} for branch in kept[key]]
    if "properties" in kept:
        kept["properties"] = {name: strict(part) for name, part in kept["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    if schema.get("nullable"):
        kept["type"] = [kept["type"], "null"]
    return kept


def admit(value: Any, schema: Json) -> Any:
    """Return `value` without nulls and with the schema's defaults, as the API server stores it."""
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {}
        given = {key: part for key, part in value.items() if part is not None}
        defaults = {key: part["default"] for key, part in properties.items() if "default" in part}
        return {
            key: admit(part, properties.get(key, rest)) for key, part in (defaults | given).items()
        }
    if isinstance(value, list):
        return [admit(part, schema.get("items", {})) for part in value]
    return value


def crd_problems(document: Json, schemas: Path) -> list[str]:
    """Return what the custom resource's v1 schema has against a document."""
    file = schemas / f"ray.io_{document['kind'].lower()}s.yaml"
    crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [entry for entry in crd["spec"]["versions"] if entry["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    validated = strict(schema)
    validated["properties"]["metadata"] = {"type": "object"}
    errors = Draft202012Validator(validated).iter_errors(admit(document, schema))
    return [f"{error.json_path}: {error.message[:200]}" for error in errors]


def test_ray_manifests_fit_kuberay(root: Path, schemas: Path) -> None:
    for document in ray_manifests(root):
        assert document["apiVersion"] == "ray.io/v1"
        assert crd_problems(document, schemas) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "serveConfigv2"), ""),
        (("spec", "rayClusterConfig", "headGroupSpec"), {"rayStartParams": {}}),
        (("spec", "rayClusterConfig", "workerGroupSpecs", 0, "replicas"), "1"),
    ],
)
def test_the_schema_check_catches(
    root: Path, schemas: Path, path: tuple[str | int, ...], value: Any
) -> None:
    (document,) = [d for d in ray_manifests(root) if d["kind"] == "RayService"]
    place: Any = document
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    assert crd_problems(document, schemas)


@pytest.mark.parametrize("version", ["v1.33.0", "v1.37.0"])
def test_core_manifests_fit_kubernetes(root: Path, schemas: Path, version: str) -> None:
    file = schemas / f"kubernetes-{version}-definitions-strict.json"
    definitions = json.loads(file.read_text())["$defs"]
    names = {
        (kind["group"], kind["version"], kind["kind"]): name
        for name, definition in definitions.items()
        for kind in definition.get("x-kubernetes-group-version-kind", [])
    }
    core = [document for document in manifests(root) if document["kind"] not in RAY_KINDS]
    assert core
    for document in core:
        group, _, api_version = document["apiVersion"].rpartition("/")
        name = names[group, api_version, document["kind"]]
        schema = {"$ref": f"#/$defs/{name}", "$defs": definitions}
        Draft202012Validator(schema).validate(document)


def test_operator_rules_that_no_schema_holds(root: Path) -> None:
    project = (root / "requirements" / "cpu.txt").read_text().splitlines()
    (pin,) = [Requirement(line) for line in project if line.startswith("ray==")]
    for document in ray_manifests(root):
        assert re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", document["metadata"]["name"])
        cluster = cluster_of(document)
        assert pin.specifier.contains(cluster["rayVersion"])
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_pods_share_one_image_and_the_claim(root: Path) -> None:
    (claim,) = [d for d in manifests(root) if d["kind"] == "PersistentVolumeClaim"]
    for document in ray_manifests(root):
        cluster = cluster_of(document)
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            (container,), (volume, *_) = pod["containers"], pod["volumes"]
            assert container["image"] == "altiplano:latest"
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert container["volumeMounts"][0]["mountPath"] == "/mnt/altiplano"


def test_the_job_writes_what_the_service_reads(root: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    job, service = sorted(ray_manifests(root), key=lambda document: document["kind"])
    _, script, config, *overrides = job["spec"]["entrypoint"].split()
    for path in (script, config):
        assert (root / Path(path).relative_to("/opt/altiplano")).is_file()
    deploy = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = deploy.applications
    assert overrides == [f"output={application.args['artifact']}"]
    module, _, builder = application.import_path.partition(":")
    assert callable(vars(importlib.import_module(module))[builder])


def test_the_service_runs_with_the_fast_settings_of_serve(root: Path) -> None:
    from altiplano.serving.environment import FAST_SERVE

    (service,) = [each for each in manifests(root) if each["kind"] == "RayService"]
    cluster = cluster_of(service)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        assert {each["name"]: each["value"] for each in container["env"]} == FAST_SERVE


def test_the_arguments_of_the_service_are_keys_of_the_serve_section(root: Path) -> None:
    from altiplano.config.serving import ServeSection

    (service,) = [each for each in manifests(root) if each["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (arguments,) = [dict(each["args"]) for each in config["applications"]]
    del arguments["artifact"]
    section = ServeSection.model_validate(arguments)
    assert section.data_host == "node"
    secret = next(
        volume["secret"]["secretName"]
        for volume in cluster_of(service)["workerGroupSpecs"][0]["template"]["spec"]["volumes"]
        if "secret" in volume
    )
    assert secret == "altiplano-keys"
    assert section.keys.file == "/etc/altiplano/keys.jsonl"
