"""Loading, attaching and reading the BPF programs. Nothing here knows Kubernetes or ztunnel."""
