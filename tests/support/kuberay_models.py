"""Closed models of the custom resources in deploy/kuberay, for checks without a cluster.

Fields follow the API references of KubeRay ``ray.io/v1`` (1.5 and later) and of the Prometheus operator's PodMonitor.
The models list only fields in use, so that a new field is looked up before it is written. The Kubernetes schemas check
pod templates.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]
"""KubeRay appends suffixes to names, so they must stay well below Kubernetes' limit of 63 characters."""
Count = Annotated[int, Field(ge=0)]


class Closed(BaseModel):
    """Base without unknown fields or silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Closed):
    name: Name
    labels: dict[str, str] = {}


class AuthOptions(Closed):
    mode: Literal["token", "disabled"]


class HeadGroup(Closed):
    rayStartParams: dict[str, str]
    template: dict[str, Any]


class WorkerGroup(Closed):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: dict[str, Any]

    @model_validator(mode="after")
    def _in_bounds(self) -> WorkerGroup:
        if not self.minReplicas <= self.replicas <= self.maxReplicas:
            raise ValueError(f"{self.groupName}: replicas outside minReplicas and maxReplicas")
        return self


class RayClusterSpec(Closed):
    rayVersion: str
    authOptions: AuthOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup] = []

    def templates(self) -> list[dict[str, Any]]:
        """Return every pod template."""
        return [self.headGroupSpec.template, *(group.template for group in self.workerGroupSpecs)]


class SubmitterConfig(Closed):
    backoffLimit: Count


class RayJobSpec(Closed):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]
    backoffLimit: Count
    submitterConfig: SubmitterConfig
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    activeDeadlineSeconds: Annotated[int, Field(gt=0)] | None = None
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def _ttl_needs_shutdown(self) -> RayJobSpec:
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("KubeRay refuses a ttlSecondsAfterFinished without shutdownAfterJobFinishes")
        return self


class RayJob(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class UpgradeStrategy(Closed):
    type: Literal["NewCluster", "None"]


class RayServiceSpec(Closed):
    serveConfigV2: str
    serviceUnhealthySecondThreshold: Count
    deploymentUnhealthySecondThreshold: Count
    excludeHeadPodFromServeSvc: bool
    rayClusterDeletionDelaySeconds: Count
    upgradeStrategy: UpgradeStrategy
    rayClusterConfig: RayClusterSpec


class RayService(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class Selector(Closed):
    matchLabels: dict[str, str]


class Relabeling(Closed):
    sourceLabels: list[str]
    targetLabel: str


class MetricsEndpoint(Closed):
    port: str
    interval: Annotated[str, Field(pattern=r"^\d+s$")]
    relabelings: list[Relabeling] = []


class PodMonitorSpec(Closed):
    selector: Selector
    podMetricsEndpoints: list[MetricsEndpoint]


class PodMonitor(Closed):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec
