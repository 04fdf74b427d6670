"""A cluster in network namespaces: two nodes, pods, services, and the real undermesh on top.

`cluster.Cluster` is the door: it builds what a directory of Kubernetes YAML describes, starts the mesh on it
and removes every trace again. `demo` runs the table of `make demo` with it; tests use it the same way.

What may not live here: anything that runs on a user's cluster. The lab stands in for the kernel side of a
CNI, kube-proxy and the kubelet, and starts every other part with the command line that it ships with.
"""
