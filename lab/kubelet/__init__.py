"""One node's kubelet: makes the pods that the API server assigns to the node run, and says how they do.

Decisions are pure functions over a pod and what the runtime reports (`decide`, `status`, `backoff`, `env`,
`security`, `qos`, `resolv`, `payload`); `worker` carries them out, one task per pod; `kubelet` puts the parts
together. `remote` is for the API server: logs, commands and connections.
"""
