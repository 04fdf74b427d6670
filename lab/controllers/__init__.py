"""What a cluster's control plane does besides its API server: the lab's kube-controller-manager and kube-scheduler.

Each controller has a queue of keys and one function that brings one key's object to what its spec asks for, from
the informers' objects alone. A controller sees its own writes at once (`cluster.Cluster`), so it never creates twice
what it created. Modules with rules (`rollout`, `filters`, `endpoints`, ...) do no I/O.
"""
