"""The user's objects, typed: Kubernetes and Istio kinds, identities, enrolment, and where objects come from.

What lives here is pure data and pure functions of it. The one exception is `files`, the source that reads
a directory. Nothing here knows of the agent, the control plane or any wire format.
"""
