"""The cluster's DNS: what CoreDNS is in other clusters, answering from Services and EndpointSlices.

It follows the Kubernetes DNS specification 1.1.0 (https://github.com/kubernetes/dns/blob/master/docs/specification.md).
`zone` decides what a name has and `reply` turns packets into packets, both without I/O; `records` follows the API
server, `server` and `health` have the sockets. There is no outside: names outside the cluster do not exist.
"""
