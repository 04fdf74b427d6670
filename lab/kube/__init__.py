"""A Kubernetes cluster on this machine, for kubectl: nodes, API server stand-in, controllers, kubelets.

`layout` says where everything of one cluster is; every process of the lab reads it from one file.
"""
