"""The container runtime of a lab node: sandboxes and containers by crun, as a CRI runtime offers them.

Runs inside the node's namespaces (see undermesh.lab.kube.layout), so every path is the node's own. `types` is
what the kubelet sees, `node.NodeRuntime` does it, `shim` is the parent of every container.
`python -m undermesh.lab.runtime ps` shows a node's containers to a person.
"""
