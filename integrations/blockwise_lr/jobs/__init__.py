"""Cluster batch jobs: what a job is, and how Slurm, PBS and Kubernetes are told of it."""

from .kubernetes import Kubernetes
from .pbs import PBS
from .records import Records, Sent
from .slurm import Slurm
from .spec import Cluster, Job, read_site

CLUSTERS: dict[str, type[Cluster]] = {"slurm": Slurm, "kubernetes": Kubernetes, "pbs": PBS}

__all__ = ["CLUSTERS", "PBS", "Cluster", "Job", "Kubernetes", "Records", "Sent", "Slurm", "read_site"]
