"""What the translation needs to know of the mesh as a whole."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Names that stand in every resource."""

    cluster: str = "Kubernetes"
    """Cluster id: the first part of every workload uid."""
    trust_domain: str = "cluster.local"
    network: str = ""
    """Network of all addresses; empty: there is only one."""
    root_namespace: str = "undermesh-system"
    """Policies of this namespace hold for all namespaces."""
    cluster_domain: str = "cluster.local"
    """DNS suffix of service names."""
